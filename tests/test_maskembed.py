"""maskembed.py against the authors' modules (tests/data/maskembed) and against its own definitions.

The reference programs' models have large random weights, which magnify float32 rounding: their own float32 numbers
stray from the exact ones by up to 2e-5 in targets and 1e-2 in gradients. So the exact comparison is in float64, where
ours must agree with what they stored to within that rounding, and with their four training losses, computed in
float64, to 1e-6; in float32, ours may stray from the exact result no further than theirs (times 4, for luck).
"""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import masks
import maskembed
import vit
from conftest import error, refusal
from maskembed import OBJECTIVES, Objective

DATA = Path(__file__).parent / "data" / "maskembed"
FIXTURES = {"clip": "clip-vit-b", "siglip": "siglip-so400m-384", "dinov2": "dinov2-vit-b", "last-layer": "in1k-vit-b"}


class Reference:
    """One of the authors' set-ups: teacher, student, inputs and outputs."""

    def __init__(self, name: str, tmp_path: Path):
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
            about = json.loads(file.metadata()["fixture"])
        size = {"image_size": about["kwargs"].pop("img_size")} | about["kwargs"]
        path = tmp_path / "pretrained.safetensors"
        save_file(self.named("pretrained."), path)
        self.teacher = vit.load(path, replace(vit.BACKBONES[FIXTURES[name]], **size))
        self.target = "penultimate" if about["skip_blocks"] else "last"
        self.images, self.masks = self.tensors["images"], self.tensors["masks"]

    def named(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def student(self) -> maskembed.Student:
        """Ours, made from the teacher, with their head, norm and decoder."""
        student = maskembed.make_student(self.teacher, Objective(target=self.target))
        theirs = {key.replace("encoder.head.", "head."): value for key, value in self.named("student.").items()}
        missing, unexpected = student.load_state_dict(theirs, strict=False)
        assert not unexpected and all(name.startswith("encoder.") for name in missing)
        return student


@pytest.fixture(params=FIXTURES)
def reference(request, tmp_path: Path) -> Reference:
    return Reference(request.param, tmp_path)


def outputs(reference: Reference, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every stored quantity, computed by ours; losses and gradients for their stored targets, as they had them."""
    teacher, student = reference.teacher.to(dtype), reference.student().to(dtype)
    images, mask = reference.images.to(dtype), reference.masks.to(dtype)
    result = {"target": maskembed.teacher_targets(teacher, images, mask, reference.target)}
    result["embeddings"] = student.forward_encoder(images)
    result["prediction"] = student(images, mask)
    target = reference.tensors["target"].to(dtype)
    result["cosine_loss"] = maskembed.reconstruction_loss(result["prediction"], target, mask, "cosine")[None]
    result["loss"] = maskembed.reconstruction_loss(result["prediction"], target, mask)[None]
    result["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    for key in reference.named("grad."):
        result[f"grad.{key}"] = gradients[key.replace("encoder.head.", "head.")]
    return {key: value.detach() for key, value in result.items()}


def test_matches_the_authors_modules(reference: Reference):
    """Targets, embeddings, predictions, losses, gradients."""
    exact, ours = outputs(reference, torch.float64), outputs(reference, torch.float32)
    for key, value in exact.items():
        theirs = error(reference.tensors[key], value)  # how far their float32 is from our float64: rounding alone
        assert theirs < (2e-2 if key.startswith("grad.") else 2e-4), key
        assert error(ours[key], value) < max(4 * theirs, 1e-5), key
    for key in ("embeddings", "loss", "cosine_loss"):  # these are not magnified
        assert error(ours[key], reference.tensors[key]) < 1e-5, key


def test_trains_as_the_authors_do(reference: Reference):
    """Four updates in float64: model, masking, loss, gradient clipping and AdamW all enter."""
    student, mask = reference.student().double(), reference.masks.double()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    for _ in range(4):
        prediction = student(reference.images.double(), mask)
        loss = maskembed.reconstruction_loss(prediction, reference.tensors["target"].double(), mask)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    assert torch.tensor(losses, dtype=torch.float64).sub(reference.tensors["four_losses"]).abs().max() < 1e-6


def tiny(name: str = "in1k-vit-b", **changes) -> vit.ViT:
    config = replace(vit.BACKBONES[name], image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, **changes)
    torch.manual_seed(0)
    return vit.ViT(config).eval()


@pytest.mark.parametrize("size", [32, 36])
def test_masked_images_by_definition(size: int):
    """Each view of each image: hidden patches are zero, and so are pixels beyond the last whole patch."""
    images, mask = torch.randn(2, 3, size, size), masks.views(masks.uniform(2, 16, torch.Generator().manual_seed(0)))
    masked = maskembed.mask_images(images, mask, 8)
    for view, patch in itertools.product(range(6), range(16)):
        y, x = 8 * (patch // 4), 8 * (patch % 4)
        expected = images[view // 3, :, y : y + 8, x : x + 8] * mask[view, patch]
        assert torch.equal(masked[view, :, y : y + 8, x : x + 8], expected)
    assert masked[:, :, 32:].eq(0).all() and masked[:, :, :, 32:].eq(0).all()


def test_targets_are_the_tokens_of_masked_images():
    teacher, images = tiny(), torch.randn(2, 3, 32, 32)
    mask = masks.views(masks.uniform(2, 16, torch.Generator().manual_seed(0)))
    masked = images.repeat_interleave(3, 0) * F.interpolate(mask.view(-1, 1, 4, 4), scale_factor=8)
    last = maskembed.teacher_targets(teacher, images, mask, "last")
    assert error(last, teacher(masked)) < 1e-5
    assert torch.equal(maskembed.teacher_targets(teacher, images, mask, "cls"), last[:, :1])
    assert error(maskembed.teacher_targets(teacher, images, mask), teacher(masked, skip_blocks=1)) < 1e-5
    for target in ("cls", "crop"):
        assert "no class token" in refusal(maskembed.teacher_targets, tiny("siglip-vit-b"), images, mask, target)


@pytest.mark.parametrize("name", ["siglip-vit-b", "dinov2-vit-b"])
def test_prefix_and_hidden_embeddings_do_not_reach_the_decoder(name: str):
    """The prediction depends on the embeddings of visible patches alone."""
    student = maskembed.make_student(tiny(name))
    P = student.encoder.config.num_prefix
    embeddings = torch.randn(2, P + 16, 32)
    mask = masks.uniform(2, 16, torch.Generator().manual_seed(0))
    for block in student.decoder.blocks:
        block.ls1.gamma.data.fill_(1.0), block.ls2.gamma.data.fill_(1.0)
    changed = embeddings.clone()
    changed[:, :P] += 1
    changed[:, P:] += (1 - mask)[..., None]
    assert torch.equal(student.forward_decoder(embeddings, mask), student.forward_decoder(changed, mask))
    changed[:, P:] += mask[..., None]
    assert not torch.allclose(student.forward_decoder(embeddings, mask), student.forward_decoder(changed, mask))


@pytest.mark.parametrize("name", ["clip-vit-b", "beit-vit-b", "eva02-vit-b", "dinov2-vit-b"])
def test_student_at_the_start(name: str):
    """A copy of the teacher with a fresh norm, a zero head, and a plain small decoder; the cap where it is due."""
    changes = {"mlp_ratio": 8 / 3} if name.startswith("eva") else {}
    teacher = tiny(name, **changes)
    student = maskembed.make_student(teacher)
    config = student.encoder.config
    assert config.softcap == (None if config.family != "vit" else 30.0) and config.final_norm == 1e-5
    assert student.encoder.norm.weight.eq(1).all() and student.encoder.norm.eps == 1e-5
    state = student.encoder.state_dict()
    assert all(torch.equal(state[k], v) for k, v in teacher.state_dict().items() if not k.startswith("norm."))
    images = torch.randn(2, 3, 32, 32)
    assert student.forward_encoder(images).eq(0).all()
    assert student(images, torch.ones(2, 16)).shape == (2, config.num_prefix + 16, 32)
    block = student.decoder.blocks[0]
    assert block.mlp.fc2.in_features == 128 and block.ls1.gamma.eq(1e-6).all() and block.norm1.eps == 1e-5
    assert block.attn.softcap is None
    if name == "eva02-vit-b":  # the authors' 9.45M numbers a block at 768
        with torch.device("meta"):
            size = sum(p.numel() for p in maskembed.Decoder(vit.BACKBONES[name]).blocks[0].parameters())
        assert size == 9_451_776
    else:
        assert block.mlp.act == ("quick_gelu" if name == "clip-vit-b" else "gelu")


def test_a_teacher_in_bf16_answers_the_same():
    """round_linear_weights does once what autocast does at each use: not a bit differs."""
    teacher, images, mask = tiny("clip-vit-b"), torch.randn(2, 3, 32, 32), masks.uniform(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        before = maskembed.teacher_targets(teacher, images, mask)
        vit.round_linear_weights(teacher)
        assert teacher.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
        assert torch.equal(maskembed.teacher_targets(teacher, images, mask), before)


def test_options_of_the_decoder_and_the_last_block():
    teacher = tiny()
    student = maskembed.make_student(teacher, decoder_depth=3, decoder_width=64, softcap=None)
    assert student(torch.randn(1, 3, 32, 32), torch.ones(1, 16)).shape == (1, 17, 32)
    assert len(student.decoder.blocks) == 3 and student.decoder.blocks[0].attn.num_heads == 4
    assert student.decoder.blocks[0].attn.softcap is None and student.encoder.config.softcap is None
    with pytest.raises(ValueError, match="decoder width 50"):
        maskembed.make_student(teacher, decoder_width=50)
    fresh = maskembed.make_student(teacher, reinit_last_block=True).encoder.blocks
    assert torch.equal(fresh[0].mlp.fc1.weight, teacher.blocks[0].mlp.fc1.weight)
    assert not torch.equal(fresh[1].mlp.fc1.weight, teacher.blocks[1].mlp.fc1.weight)


def test_losses_are_their_formulas():
    p, t, m = torch.randn(6, 21, 8), torch.randn(6, 21, 8), masks.uniform(6, 16, torch.Generator().manual_seed(3))
    loss = lambda kind: maskembed.reconstruction_loss(p, t, m, kind).item()  # noqa: E731
    squares = (p - t).square().mean(-1)  # [6, 21], 5 prefix tokens
    assert loss("mse") == pytest.approx(squares.mean().item())
    assert loss("mae") == pytest.approx((p - t).abs().mean().item())
    cosine = (p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1))
    assert loss("cosine") == pytest.approx((1 - cosine).mean().item())
    hidden = (squares[:, :5].sum() + (squares[:, 5:] * (1 - m)).sum()) / (6 * 21)
    assert loss("mse-hidden") == pytest.approx(hidden.item())
    prefix = squares[:, :5].sum().item() / (6 * 21)  # counted in both
    assert loss("mse-hidden") + loss("mse-visible") - prefix == pytest.approx(loss("mse"))
    p, t = p[:, :1], t[:, :1]  # a class token alone counts whatever is hidden
    assert loss("mse-hidden") == loss("mse-visible") == loss("mse")


def test_baselines_of_the_family():
    teacher, images = tiny(), torch.randn(3, 3, 32, 32)
    mask = masks.block(3, 4, 0.4, torch.Generator().manual_seed(0))
    additive = maskembed.make_student(teacher, OBJECTIVES["additive"])
    assert additive(images, mask).eq(0).all()  # its zero head
    torch.nn.init.normal_(additive.head.weight)
    by_hand = (additive.forward_encoder(images)[:, 1:] * mask[..., None]).sum(1, keepdim=True)  # equation 2
    assert error(additive(images, mask), by_hand) < 1e-6
    average = maskembed.make_student(teacher, OBJECTIVES["average"], softcap=None)
    tokens = teacher(images)[:, 1:]  # it keeps the pre-trained norm, and has no head
    by_hand = torch.stack([tokens[i, mask[i] > 0].mean(0, keepdim=True) for i in range(3)])
    assert error(average(images, mask), by_hand) < 1e-5
    windows = masks.from_windows(torch.tensor([[0, 0, 4, 4], [1, 0, 3, 2], [0, 1, 2, 3]]), 4)
    targets = maskembed.teacher_targets(teacher, images, windows, "crop")
    assert error(targets[0], teacher(images[:1])[0, :1]) < 1e-4  # the whole image
    window = F.interpolate(images[1:2, :, 8:32, 0:16], (32, 32), mode="bicubic", antialias=True)
    assert error(targets[1], teacher(window)[0, :1]) < 1e-5


def test_files(tmp_path: Path):
    """A whole model comes back bit by bit, its encoder by vit.load too; what is incomplete is refused."""
    student = maskembed.make_student(tiny("clip-vit-b"), decoder_depth=1, decoder_width=48)
    student.target_scale = 2.5
    maskembed.save(student, tmp_path / "aligned.safetensors", recipe="own")
    again, encoder = maskembed.load(tmp_path / "aligned.safetensors"), vit.load(tmp_path / "aligned.safetensors")
    assert again.target_scale == 2.5 and again.encoder.config == student.encoder.config == encoder.config
    ours, theirs = again.state_dict(), student.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images), again.encoder(images))
    vit.save(tiny(), tmp_path / "backbone.safetensors")
    assert "no head and decoder" in refusal(maskembed.load, tmp_path / "backbone.safetensors")
    with safe_open(tmp_path / "aligned.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "aligned.safetensors")
    del state["decoder.norm.weight"]
    save_file(state, tmp_path / "part.safetensors", metadata)
    assert "decoder.norm.weight" in refusal(maskembed.load, tmp_path / "part.safetensors")


@pytest.mark.parametrize("name", ["maskembed", "average"])
def test_files_of_an_earlier_version_load(name: str, tmp_path: Path):
    """Their metadata named the target of every baseline cls, and gave the decoder a soft-cap of its own."""
    student = maskembed.make_student(tiny(), OBJECTIVES[name])
    about = {"decoder": {"depth": 2, "width": 32, "softcap": None}, "head": True, "target": "penultimate"}
    if name == "average":
        about |= {"decoder": "mean", "head": False, "target": "cls"}
    metadata = {"config": asdict(student.encoder.config), "maskembed": about | {"target_scale": 1.0}}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    save_file(student.state_dict(), tmp_path / "old.safetensors", metadata)
    images, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 16)
    assert torch.equal(maskembed.load(tmp_path / "old.safetensors")(images, mask), student.eval()(images, mask))
