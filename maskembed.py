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


# ----------------------------------------------------------------------------------------------------------------------
# The teacher


@torch.no_grad()
def teacher_targets(teacher: ViT, images: Tensor, masks: Tensor, target: str = "penultimate") -> Tensor:
    """f(m(x)): what the teacher says of each masked view.

    images [B, 3, H, W], masks [B * V, N] -> [B * V, T, D]; for target "cls" [B * V, 1, D].
    target: "penultimate", all tokens without the last block, then the final norm (the paper's choice); "last", with it;
        "cls", the class token of "last". A backbone without a class token raises ValueError there.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r}: choose one of {', '.join(TARGETS)}")
    if target == "cls":
        return class_token(teacher, images, masks)
    return teacher(images, masks, skip_blocks=int(target == "penultimate"))


@torch.no_grad()
def crop_targets(teacher: ViT, images: Tensor, windows: Tensor) -> Tensor:
    """CLIPSelf (section B.3): each image's window, resized to the full input, gives the class token [B, 1, D].

    windows: [B, 4] integers top, left, height, width, in patches.
    """
    size, p = teacher.config.image_size, teacher.config.patch_size
    crops = []
    for image, (top, left, height, width) in zip(images, (windows * p).tolist()):
        crop = image[None, :, top : top + height, left : left + width]
        crops.append(F.interpolate(crop, (size, size), mode="bicubic", antialias=True))
    return class_token(teacher, torch.cat(crops))


def class_token(teacher: ViT, images: Tensor, masks: Tensor | None = None) -> Tensor:
    """The class token after the final norm, [M, 1, D]."""
    if not teacher.config.class_token:
        raise ValueError("target cls: this backbone has no class token; use penultimate or last")
    return teacher(images, masks)[:, :1]


class TargetScale:
    """The constant that gives the targets unit variance around one scalar mean (over tokens, channels and views).

    Feed it the targets of the validation set; `sums` (float64: count, sum, sum of squares) may be summed over ranks.
    """

    def __init__(self):
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, targets: Tensor) -> None:
        """Count targets of any shape."""
        total, squares = targets.sum(dtype=torch.float64), targets.float().square().sum(dtype=torch.float64)
        self.sums += torch.tensor([targets.numel(), total.item(), squares.item()], dtype=torch.float64)

    @property
    def value(self) -> float:
        """1 / standard deviation."""
        count, total, squares = self.sums.tolist()
        return (squares / count - (total / count) ** 2) ** -0.5


# ----------------------------------------------------------------------------------------------------------------------
# The student


class Decoder(nn.Module):
    """h: a shallow transformer from masked embeddings [M, T, W] to the teacher's tokens [M, T, D] (section C).

    Position embedding, pre-norm blocks with LayerScale, norm, linear layer. For BEiT and EVA02 the same plain blocks.

    encoder: the encoder's config, whose heads, activation and qkv bias the blocks take over. width: W, a multiple of
    the encoder's channels per head; None: the encoder's. softcap: of the blocks' attention; the paper has none there.
    """

    def __init__(self, encoder: ViTConfig, depth: int = 2, width: int | None = None, softcap: float | None = None):
        super().__init__()
        width, head_dim = width or encoder.embed_dim, encoder.embed_dim // encoder.num_heads
        if width % head_dim:
            raise ValueError(
                f"decoder width {width}: must be a multiple of the {head_dim} channels of an attention head"
            )
        self.options = {"depth": depth, "width": width, "softcap": softcap}
        config = replace(
            encoder, family="vit", embed_dim=width, num_heads=width // head_dim, depth=depth, mlp_ratio=4.0,
            act=encoder.act if encoder.family == "vit" else "gelu", norm_eps=1e-5, layer_scale=1e-6, softcap=softcap,
        )  # fmt: skip
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, encoder.num_prefix + encoder.num_patches, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-5)
        self.head = nn.Linear(width, encoder.embed_dim)
        self.checkpointing = False  # as in ViT

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(vit.run_blocks(self.blocks, x + self.pos_embed, None, self.checkpointing)))


class Student(nn.Module):
    """Encoder, linear head and decoder. After alignment the encoder is the product.

    decoder: a `Decoder`; or "sum" or "mean" for the baselines that add up or average the visible embeddings.
    target: what is reconstructed; with "cls" the first token of the decoder's output.
    target_scale: the constant the teacher's targets are multiplied by, kept here to be stored with the model.
    """

    def __init__(self, encoder: ViT, head: nn.Module, decoder: Decoder | str, target: str = "penultimate"):
        super().__init__()
        self.encoder, self.head, self.target, self.target_scale = encoder, head, target, 1.0
        self.pool = decoder if isinstance(decoder, str) else None
        self.decoder = None if self.pool else decoder

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """h(m(g(x))): images [B, 3, H, W], masks [B * V, N] -> [B * V, T, D], or [B * V, 1, D] for a class token."""
        return self.forward_decoder(self.forward_encoder(images), masks)

    def forward_encoder(self, images: Tensor) -> Tensor:
        """Embeddings after the head, [B, 3, H, W] -> [B, T, W]: once an image, whatever the number of views."""
        return self.head(self.encoder(images))

    def forward_decoder(self, embeddings: Tensor, masks: Tensor) -> Tensor:
        """Mask the embeddings [B, T, W] with masks [B * V, N] and reconstruct. Prefix tokens are always hidden."""
        P = self.encoder.config.num_prefix
        patches = embeddings[:, P:]  # [B, N, W]
        B, N, W = patches.shape
        masks = masks.view(B, -1, N, 1).to(patches.dtype)  # [B, V, N, 1]
        visible = (patches[:, None] * masks).flatten(0, 1)  # [B * V, N, W]
        if self.pool:
            total = visible.sum(1, keepdim=True)  # [B * V, 1, W]
            return total / masks.sum(2).view(-1, 1, 1) if self.pool == "mean" else total
        x = self.decoder(F.pad(visible, (0, 0, P, 0)))  # [B * V, T, D]
        return x[:, :1] if self.target == "cls" else x


def reconstruction_loss(prediction: Tensor, target: Tensor, masks: Tensor, kind: str = "mse") -> Tensor:
    """The distance of prediction and target [M, T, D], a scalar; masks [M, N].

    kind: "mse" (equation 1), "mae", "cosine" (1 - cos, mean over tokens), and "mse-hidden" or "mse-visible": squared
    errors of those patches and of the prefix tokens, over the number of all tokens.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)  # bf16 under autocast -> float32
    prediction, target = prediction.to(dtype), target.to(dtype)
    if kind == "mse":
        return F.mse_loss(prediction, target)
    if kind == "mae":
        return F.l1_loss(prediction, target)
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    if kind not in LOSSES:
        raise ValueError(f"loss {kind!r}: choose one of {', '.join(LOSSES)}")
    counted = 1 - masks if kind == "mse-hidden" else masks  # [M, N]
    counted = F.pad(counted, (target.shape[1] - masks.shape[1], 0), value=1.0)  # [M, T]: prefix tokens always
    return ((prediction - target).square().mean(-1) * counted).mean()


# ----------------------------------------------------------------------------------------------------------------------
# The method and its baselines


@dataclass(frozen=True)
class Objective:
    """What tells a baseline of the same family from MaskEmbed (sections 3.1, B.3): the defaults it brings with it."""

    decoder: str = "transformer"  # transformer | sum | mean
    head: bool = True  # a linear head and a fresh final norm, or the pre-trained norm alone
    target: str = "penultimate"
    masks: str = "uniform"
    views: int = 3  # mask, complement, all-ones; or the mask alone
    loss: str = "mse"


OBJECTIVES = {
    "maskembed": Objective(),
    "additive": Objective(decoder="sum", target="cls", views=1),  # equation 2
    "average": Objective(decoder="mean", head=False, target="cls", masks="block", views=1),
    "crop": Objective(decoder="mean", head=False, target="cls", masks="crop", views=1, loss="cosine"),  # CLIPSelf
}


def make_student(
    teacher: ViT,
    objective: Objective = OBJECTIVES["maskembed"],
    softcap: float | None = 30.0,
    decoder_depth: int = 2,
    decoder_width: int | None = None,
    decoder_softcap: float | None = None,
    reinit_last_block: bool = False,
) -> Student:
    """The student at the start of alignment: a trainable copy of the teacher, a zero head, a random decoder.

    The encoder's final norm is a fresh LayerNorm (1e-5), also where the backbone has none (BEiT); where the objective
    has no head it stays the pre-trained one. softcap: of the encoder's attention; BEiT and EVA02 never get one.
    """
    config = replace(teacher.config, softcap=softcap if teacher.config.family == "vit" else None)
    if objective.head:
        config = replace(config, final_norm=1e-5)
    encoder = ViT(config)
    state = {k: v for k, v in teacher.state_dict().items() if not (objective.head and k.startswith("norm."))}
    if reinit_last_block:
        state = {k: v for k, v in state.items() if not k.startswith(f"blocks.{config.depth - 1}.")}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(("norm.", f"blocks.{config.depth - 1}.")) for name in missing)
    decoder: Decoder | str = objective.decoder
    if decoder == "transformer":
        decoder = Decoder(config, decoder_depth, decoder_width, decoder_softcap)
    width = config.embed_dim if isinstance(decoder, str) else decoder.options["width"]
    head: nn.Module = nn.Identity()
    if objective.head:
        head = nn.Linear(config.embed_dim, width)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    return Student(encoder, head, decoder, objective.target)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def save(student: Student, path: str | Path, **notes: object) -> None:
    """Write encoder.*, head.* and decoder.* with what rebuilds them; `vit.load` on the file gives the encoder.

    notes: anything JSON-serializable to keep with it (the recipe, the losses).
    """
    about = {
        "decoder": student.pool or student.decoder.options,
        "head": isinstance(student.head, nn.Linear),
        "target": student.target,
        "target_scale": student.target_scale,
    }
    metadata = {"config": json.dumps(asdict(student.encoder.config)), "maskembed": json.dumps(about)}
    vit.save_tensors(student.state_dict(), path, metadata | {k: json.dumps(v) for k, v in notes.items()})


def load(path: str | Path, config: str | ViTConfig | None = None) -> Student:
    """A whole aligned model: a file of `save`, or a checkpoint of the MaskEmbed authors (config: its backbone).

    Errors: vit.WeightsError, which names the file and what is wrong with it.
    """
    tensors = vit.WeightFile(path)
    encoder = vit.load(path, config)
    names = {name.replace("encoder.head.", "head.", 1): name for name in tensors.names}  # the authors keep it inside
    if "maskembed" in tensors.metadata:
        about = json.loads(tensors.metadata["maskembed"])
    elif "decoder.pos_embed" in names:
        depth = len({name.split(".")[2] for name in names if name.startswith("decoder.blocks.")})
        width = tensors[names["decoder.pos_embed"]].shape[-1]
        about = {
            "decoder": {"depth": depth, "width": width},
            "head": True,
            "target": "penultimate",
            "target_scale": 1.0,
        }
    else:
        raise vit.WeightsError(
            f"{path}: holds a backbone but no head and decoder; give a file that train_align.py wrote"
        )
    decoder = about["decoder"] if isinstance(about["decoder"], str) else Decoder(encoder.config, **about["decoder"])
    width = encoder.config.embed_dim if isinstance(decoder, str) else decoder.options["width"]
    head = nn.Linear(encoder.config.embed_dim, width) if about["head"] else nn.Identity()
    student = Student(encoder, head, decoder, about["target"])
    student.target_scale = about["target_scale"]
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.startswith("encoder."):
                continue
            if name not in names or tensors[names[name]].shape != parameter.shape:
                raise vit.WeightsError(f"{path}: tensor {name} is missing or of another shape; the file is incomplete")
            parameter.copy_(tensors[names[name]])
    return student.eval()
