"""MaskEmbed, masked embedding self-consistency: the paper's way to teach a vision transformer what is where.

A frozen teacher f sees masked images; the student's encoder g sees whole ones, and its embeddings are masked instead. A
small decoder h must predict from these what the teacher says of the masked image (equation 1):

    min E [ || h(m(g(x))) - f(m(x)) ||^2 ]

so each embedding has to hold what its own patch means, and no more. Needs vit.py beside it and nothing else of ours.

Shapes: B images, V views of each (adjacent), N patches, P prefix tokens, T = P + N, D the width of encoder and teacher,
W the decoder's. A mask has 1 for a visible patch.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vit
from vit import Block, ViT, ViTConfig

TARGETS = ("penultimate", "last", "cls")
LOSSES = ("mse", "mae", "cosine", "mse-hidden", "mse-visible")


# --- f(m(x)): the teacher ---------------------------------------------------------------------------------------------

def mask_images(images: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """m(x): normalized images [B, 3, H, W], masks [B * V, N] -> [B * V, 3, H, W].

    Hidden patches become zero, the mean color, and so do pixels beyond the last whole patch, which belong to none."""
    B, _, H, W = images.shape
    rows, columns = H // patch_size, W // patch_size
    m = masks.view(B, -1, 1, rows, columns)  # [B, V, 1, rows, columns]
    m = m.repeat_interleave(patch_size, 3).repeat_interleave(patch_size, 4)
    m = F.pad(m, (0, W - columns * patch_size, 0, H - rows * patch_size))  # [B, V, 1, H, W]
    return (images[:, None] * m).flatten(0, 1)


@torch.no_grad()
def teacher_targets(teacher: ViT, images: Tensor, masks: Tensor, target: str = "penultimate") -> Tensor:
    """f(m(x)), what the teacher says of each masked view: images [B, 3, H, W], masks [B * V, N] -> [B * V, T, D].

    target: "penultimate", all tokens without the last block, then the final norm (the paper's choice); "last", with it;
        "cls", the class token of "last", [B * V, 1, D]; "crop", that of the visible window, cut out and resized
        (CLIPSelf). ValueError: the backbone has no class token."""
    if target in ("cls", "crop") and not teacher.config.class_token:
        raise ValueError(f"target {target}: this backbone has no class token; choose the target penultimate or last")
    if target == "crop":
        return teacher(crop_windows(images, masks, teacher.config.patch_size))[:, :1]
    tokens = teacher(mask_images(images, masks, teacher.config.patch_size), skip_blocks=int(target == "penultimate"))
    return tokens[:, :1] if target == "cls" else tokens


def crop_windows(images: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """CLIPSelf's crops (appendix B.3): the window that a mask [B, N] shows, resized to the whole image [B, 3, H, W]."""
    rows, columns = (side // patch_size for side in images.shape[2:])
    crops = []
    for image, mask in zip(images, masks.view(-1, rows, columns).cpu()):
        (y, x), p = mask.nonzero().T, patch_size
        crop = image[None, :, y.min() * p : (y.max() + 1) * p, x.min() * p : (x.max() + 1) * p]
        crops.append(F.interpolate(crop, images.shape[2:], mode="bicubic", antialias=True))
    return torch.cat(crops)


def moments(targets: Tensor) -> Tensor:
    """Count, sum and sum of squares of targets of any shape, float64 [3]; those of batches and ranks add up."""
    count = targets.new_tensor(targets.numel(), dtype=torch.float64)
    return torch.stack([count, targets.sum(dtype=torch.float64), targets.float().square().sum(dtype=torch.float64)])


def target_scale(count: float, total: float, squares: float) -> float:
    """1 / standard deviation, by these moments: the factor that gives the targets unit variance (around one mean)."""
    return (squares / count - (total / count) ** 2) ** -0.5


# --- h(m(g(x))): the student ------------------------------------------------------------------------------------------

class Decoder(nn.Module):
    """h: a shallow transformer from masked embeddings [M, T, W] to the teacher's tokens [M, T, D] (appendix C).

    Position embedding, pre-norm blocks with LayerScale, norm, linear layer. For BEiT the same plain blocks.

    encoder: the encoder's config, whose heads, activation and qkv bias the blocks take over (EVA02's: SwiGLU, with a
    hidden width of 4 W), but not the soft-cap. width: W, a multiple of the encoder's channels per head (ValueError);
    None: the encoder's."""

    def __init__(self, encoder: ViTConfig, depth: int = 2, width: int | None = None):
        super().__init__()
        width, head_dim = width or encoder.embed_dim, encoder.embed_dim // encoder.num_heads
        if width % head_dim:
            raise ValueError(f"decoder width {width}: must be a multiple of the {head_dim} channels per head")
        self.options = {"depth": depth, "width": width}
        act = "swiglu" if encoder.family == "eva02" else encoder.act
        config = replace(
            encoder, family="vit", embed_dim=width, num_heads=width // head_dim, depth=depth, mlp_ratio=4.0, act=act,
            norm_eps=1e-5, layer_scale=1e-6, softcap=None,
        )
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, encoder.num_prefix + encoder.num_patches, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-5)
        self.head = nn.Linear(width, encoder.embed_dim)
        self.checkpointing = False  # as in ViT

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed
        x = vit.run_blocks(self.blocks, x, checkpointing=self.checkpointing)
        return self.head(self.norm(x))


class Student(nn.Module):
    """Encoder, linear head and decoder. After alignment the encoder is the product.

    decoder: a `Decoder`; or "sum" or "mean" for the baselines that add up or average the visible embeddings.
    target: what is reconstructed; with "cls" the first token of the decoder's output.
    target_scale: the constant that multiplies the teacher's targets, stored with the model."""

    def __init__(self, encoder: ViT, head: nn.Module, decoder: Decoder | str, target: str = "penultimate",
                 target_scale: float = 1.0):
        super().__init__()
        self.encoder, self.head, self.target, self.target_scale = encoder, head, target, target_scale
        self.pool = decoder if isinstance(decoder, str) else None
        self.decoder = None if self.pool else decoder

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """h(m(g(x))): images [B, 3, H, W], masks [B * V, N] -> [B * V, T, D], or [B * V, 1, D] for a class token."""
        return self.forward_decoder(self.forward_encoder(images), masks)

    def forward_encoder(self, images: Tensor) -> Tensor:
        """g(x): embeddings after the head, [B, 3, H, W] -> [B, T, W], once per image whatever the number of views."""
        return self.head(self.encoder(images))

    def forward_decoder(self, embeddings: Tensor, masks: Tensor) -> Tensor:
        """h(m(g)): embeddings [B, T, W] are masked by [B * V, N] and decoded. Prefix tokens are always hidden."""
        P = self.encoder.config.num_prefix
        patches = embeddings[:, P:]  # [B, N, W]
        B, N, W = patches.shape
        masks = masks.view(B, -1, N, 1).to(patches.dtype)  # [B, V, N, 1]
        visible = (patches[:, None] * masks).flatten(0, 1)  # [B * V, N, W]
        if self.pool:  # equation 2: the sum of the visible embeddings; or their mean
            total = visible.sum(1, keepdim=True)  # [B * V, 1, W]
            return total / masks.sum(2).view(-1, 1, 1) if self.pool == "mean" else total
        x = self.decoder(F.pad(visible, (0, 0, P, 0)))  # [B * V, T, D]
        return x[:, :1] if self.target == "cls" else x


def reconstruction_loss(prediction: Tensor, target: Tensor, masks: Tensor, kind: str = "mse") -> Tensor:
    """The distance between prediction and target [M, T, D], a scalar; masks [M, N].

    kind: one of LOSSES: "mse" (equation 1), "mae", "cosine" (1 - cos, mean over tokens), and "mse-hidden" or
        "mse-visible": squared errors of those patches and of the prefix tokens, over the number of all tokens."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)  # bf16 under autocast -> float32
    prediction, target = prediction.to(dtype), target.to(dtype)
    if kind == "mse" or kind.startswith("mse-") and target.shape[1] == 1:  # a class token alone always counts
        return F.mse_loss(prediction, target)
    if kind == "mae":
        return F.l1_loss(prediction, target)
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    counted = 1 - masks if kind == "mse-hidden" else masks  # [M, N]
    counted = F.pad(counted, (target.shape[1] - masks.shape[1], 0), value=1.0)  # [M, T]: prefix tokens always
    return ((prediction - target).square().mean(-1) * counted).mean()


# --- the method and its baselines -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Objective:
    """How MaskEmbed and the baselines of its family differ (section 3.1, appendix B.3): the defaults of each one."""

    decoder: str = "transformer"  # transformer | sum | mean
    head: bool = True  # a linear head and a fresh final norm, or the pre-trained norm alone
    target: str = "penultimate"
    masks: str = "uniform"
    views: str = "3"  # mask, complement, all-ones; or "1", the mask alone
    loss: str = "mse"


OBJECTIVES = {
    "maskembed": Objective(),  # equation 1
    "additive": Objective(decoder="sum", target="cls", views="1"),  # equation 2
    "average": Objective(decoder="mean", head=False, target="cls", masks="block", views="1"),
    "crop": Objective(decoder="mean", head=False, target="crop", masks="crop", views="1", loss="cosine"),  # CLIPSelf
}


def make_student(teacher: ViT, objective: Objective = OBJECTIVES["maskembed"], softcap: float | None = 30.0,
                 decoder_depth: int = 2, decoder_width: int | None = None, reinit_last_block: bool = False) -> Student:
    """The student at the start of alignment: a trainable copy of the teacher, a zero head, a random decoder.

    The encoder's final norm is a fresh LayerNorm (1e-5), also where the backbone has none (BEiT); where the objective
    has no head it stays the pre-trained one. softcap: of the encoder's attention; BEiT and EVA02 never get one."""
    config = replace(teacher.config, softcap=softcap if teacher.config.family == "vit" else None)
    if objective.head:
        config = replace(config, final_norm=1e-5)
    encoder = ViT(config)
    kept = teacher.state_dict()
    if objective.head:  # a fresh final norm
        kept = {k: v for k, v in kept.items() if not k.startswith("norm.")}
    if reinit_last_block:
        kept = {k: v for k, v in kept.items() if not k.startswith(f"blocks.{config.depth - 1}.")}
    encoder.load_state_dict(encoder.state_dict() | kept)
    decoder, width = objective.decoder, config.embed_dim
    if decoder == "transformer":
        decoder = Decoder(config, decoder_depth, decoder_width)
        width = decoder.options["width"]
    head = nn.Linear(config.embed_dim, width) if objective.head else nn.Identity()
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return Student(encoder, head, decoder, objective.target)


# --- files ------------------------------------------------------------------------------------------------------------

def describe(student: Student, **notes: object) -> dict[str, str]:
    """What rebuilds a student, and `notes`, as the metadata of its file."""
    decoder, head = student.pool or student.decoder.options, isinstance(student.head, nn.Linear)
    about = {"decoder": decoder, "head": head, "target": student.target, "target_scale": student.target_scale}
    metadata = {"config": asdict(student.encoder.config), "maskembed": about} | notes
    return {key: json.dumps(value) for key, value in metadata.items()}


def save(student: Student, path: str | Path, **notes: object) -> None:
    """Write encoder.*, head.* and decoder.* with what rebuilds them, and `notes`; `vit.load` reads the encoder."""
    vit.save_tensors(student.state_dict(), path, describe(student, **notes))


def load(path: str | Path, config: str | ViTConfig | None = None) -> Student:
    """A whole aligned model, in eval mode, from a file that `save` wrote; `config` and errors as in `vit.load`."""
    encoder, (tensors, metadata) = vit.load(path, config), vit.read_tensors(path)
    if "maskembed" not in metadata:
        raise ValueError(f"{path}: holds no head and decoder; give a file that train_align.py or convert.py wrote")
    about = json.loads(metadata["maskembed"])
    decoder, width = about["decoder"], encoder.config.embed_dim
    if isinstance(decoder, dict):
        decoder, width = Decoder(encoder.config, decoder["depth"], decoder["width"]), decoder["width"]
    head = nn.Linear(encoder.config.embed_dim, width) if about["head"] else nn.Identity()
    student = Student(encoder, head, decoder, about["target"], about["target_scale"])
    tensors |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}  # of the wanted image size
    if (name := "decoder.pos_embed") in tensors:
        tensors[name] = vit.resample_positions(tensors[name], encoder.config.grid, encoder.config.num_prefix)
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path}: is incomplete or damaged ({str(error).splitlines()[1].strip()})") from None
    return student.eval()
