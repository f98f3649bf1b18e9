"""Hugging Face transformers' networks, tiny and random, as ``save_pretrained`` writes them: the features are those that
transformers computes itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evalsuite.checkpoints import File, State, convert, load_backbone
from evalsuite.errors import BackboneError
from evalsuite.hooks import Registry

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
WINDOWS = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 2, "image_size": 64}
PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Answer = tuple[Tensor, Tensor | None]  # the pooled feature, and patches where the network gives them


def shaken(net: nn.Module) -> nn.Module:
    """The network with every number moved, so that one left out or out of its place shows."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point() and tensor.numel():
                noise = torch.randn(tensor.shape, generator=rng) * 0.2
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    return net.eval()


class Made(NamedTuple):
    """A network of transformers', the architecture and options it is to become, and how it answers itself."""

    net: nn.Module
    arch: str
    options: dict[str, Any]
    answer: Callable[[nn.Module, Tensor], Answer]


def of(model: str, config: str, **values: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**values))


def last(skip: int) -> Callable[[nn.Module, Tensor], Answer]:
    """The class token after the last norm, and what follows ``skip`` tokens."""

    def answer(net: nn.Module, x: Tensor) -> Answer:
        inner = net if type(net).__name__.endswith("Model") else getattr(net, net.base_model_prefix)
        states = inner(x).last_hidden_state
        return states[:, 0], states[:, skip:]

    return answer


def pooler(net: nn.Module, x: Tensor) -> Answer:
    inner = getattr(net, "vision_model", None) or getattr(net, net.base_model_prefix, net)
    return inner(x).pooler_output.flatten(1), None


def distilled(net: nn.Module, x: Tensor) -> Answer:
    states = net.deit(x).last_hidden_state
    return states[:, :2].mean(1), states[:, 2:]


def unmasked(net: nn.Module, x: Tensor) -> Answer:
    net.config.mask_ratio = 0.0
    states = net.vit(x, noise=torch.arange(16.0).expand(len(x), -1)).last_hidden_state
    return states[:, 0], states[:, 1:]


VIT = {"embed_dim": 32, "depth": 2, "patch_size": 8, "num_heads": 4, "mlp_ratio": 2.0, "img_size": 32}
MODELS: dict[str, Callable[[], Made]] = {
    "ViT": lambda: Made(
        of("ViTModel", "ViTConfig", **SMALL), "vit_base_patch16_224", VIT | {"norm_eps": 1e-12}, last(1)
    ),
    "ViT, a classifier of other numbers": lambda: Made(
        of("ViTForImageClassification", "ViTConfig", **SMALL | {"num_attention_heads": 8, "layer_norm_eps": 1e-3,
           "hidden_act": "gelu_new", "qkv_bias": False}),
        "vit_base_patch16_224",
        VIT | {"num_heads": 8, "norm_eps": 1e-3, "act_layer": "gelu_tanh", "qkv_bias": False},
        last(1),
    ),
    "ViT-MAE": lambda: Made(
        of("ViTMAEForPreTraining", "ViTMAEConfig", **SMALL, decoder_hidden_size=16, decoder_num_hidden_layers=1,
           decoder_num_attention_heads=2, decoder_intermediate_size=16),
        "vit_base_patch16_224", VIT | {"norm_eps": 1e-12}, unmasked,
    ),
    "DeiT, distilled": lambda: Made(
        of("DeiTForImageClassificationWithTeacher", "DeiTConfig", **SMALL),
        "deit_base_distilled_patch16_224", VIT | {"norm_eps": 1e-12}, distilled,
    ),
    "DINOv2": lambda: Made(
        of("Dinov2Model", "Dinov2Config", **SMALL | {"mlp_ratio": 2}),
        "vit_base_patch16_224", VIT | {"norm_eps": 1e-6, "init_values": 1.0}, last(1),
    ),
    "DINOv2, registers": lambda: Made(
        of("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **SMALL | {"mlp_ratio": 2}),
        "vit_base_patch16_224",
        VIT | {"norm_eps": 1e-6, "init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}, last(5),
    ),
    "DINOv2, gated": lambda: Made(
        of("Dinov2ForImageClassification", "Dinov2Config", **SMALL | {"mlp_ratio": 4, "use_swiglu_ffn": True}),
        "vit_giant_patch14_dinov2", VIT | {"norm_eps": 1e-6, "init_values": 1.0, "mlp_ratio": 5.5}, last(1),
    ),
    "DINOv3": lambda: Made(
        of("DINOv3ViTModel", "DINOv3ViTConfig", **SMALL, num_register_tokens=4),
        "vit_base_patch16_dinov3_qkvb",
        {k: v for k, v in VIT.items() if k != "img_size"} | {"global_pool": "token", "norm_eps": 1e-5}, last(5),
    ),
    "DINOv3, gated": lambda: Made(
        of("DINOv3ViTModel", "DINOv3ViTConfig", **SMALL, use_gated_mlp=True, hidden_act="silu", query_bias=False,
           value_bias=False, rope_theta=50.0),
        "vit_base_patch16_dinov3",
        {k: v for k, v in VIT.items() if k != "img_size"}
        | {"global_pool": "token", "norm_eps": 1e-5, "swiglu_mlp": True, "num_reg_tokens": 0, "rope_temperature": 50.0},
        last(1),
    ),
    "BEiT": lambda: Made(
        of("BeitForImageClassification", "BeitConfig", **SMALL, use_relative_position_bias=True),
        "beit_base_patch16_224", VIT | {"norm_eps": 1e-12}, pooler,
    ),
    "BEiT, positions shared": lambda: Made(
        of("BeitModel", "BeitConfig", **SMALL, use_shared_relative_position_bias=True,
           use_absolute_position_embeddings=True, layer_scale_init_value=0.0),
        "beit_base_patch16_224",
        VIT | {"norm_eps": 1e-12, "use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
               "init_values": 0.0},
        pooler,
    ),
    "CLIP": lambda: Made(
        of("CLIPModel", "CLIPConfig", vision_config=SMALL, text_config=TEXT, projection_dim=16),
        "vit_base_patch16_224", VIT | {"norm_eps": 1e-5, "pre_norm": True, "act_layer": "quick_gelu"}, pooler,
    ),
    "CLIP, vision alone": lambda: Made(
        of("CLIPVisionModelWithProjection", "CLIPVisionConfig", **SMALL | {"hidden_act": "gelu"}),
        "vit_base_patch16_224", VIT | {"norm_eps": 1e-5, "pre_norm": True}, pooler,
    ),
    "SigLIP": lambda: Made(
        of("SiglipModel", "SiglipConfig", vision_config=SMALL, text_config=TEXT),
        "vit_base_patch16_224",
        VIT | {"norm_eps": 1e-6, "act_layer": "gelu_tanh", "class_token": False, "global_pool": "map",
               "fc_norm": False},
        pooler,
    ),
    "SigLIP, vision alone": lambda: Made(
        of("SiglipVisionModel", "SiglipVisionConfig", **SMALL),
        "vit_base_patch16_224",
        VIT | {"norm_eps": 1e-6, "act_layer": "gelu_tanh", "class_token": False, "global_pool": "map",
               "fc_norm": False},
        pooler,
    ),
    "ConvNeXt": lambda: Made(
        of("ConvNextForImageClassification", "ConvNextConfig", **STAGES),
        "convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "norm_eps": {"head": 1e-12}}, pooler,
    ),
    "ConvNeXt V2": lambda: Made(
        of("ConvNextV2Model", "ConvNextV2Config", **STAGES, layer_norm_eps=1e-3),
        "convnextv2_tiny", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "norm_eps": {"head": 1e-3}}, pooler,
    ),
    "ResNet, bottlenecks": lambda: Made(
        of("ResNetForImageClassification", "ResNetConfig", depths=[1, 1, 1, 1]),
        "resnet50", {"layers": [1, 1, 1, 1]}, pooler,
    ),
    "ResNet": lambda: Made(
        of("ResNetModel", "ResNetConfig", depths=[1, 2, 1, 1], layer_type="basic", hidden_sizes=[64, 128, 256, 512]),
        "resnet18", {"layers": [1, 2, 1, 1]}, pooler,
    ),
    "Swin": lambda: Made(
        of("SwinModel", "SwinConfig", **WINDOWS), "swin_tiny_patch4_window7_224",
        {k: v for k, v in WINDOWS.items() if k != "image_size"} | {"img_size": 64}, pooler,
    ),
    "Swin V2": lambda: Made(
        of("Swinv2ForImageClassification", "Swinv2Config", **WINDOWS, pretrained_window_sizes=[4, 4, 4, 2]),
        "swinv2_tiny_window8_256",
        {k: v for k, v in WINDOWS.items() if k != "image_size"}
        | {"img_size": 64, "pretrained_window_sizes": [4, 4, 4, 2]},
        pooler,
    ),
}  # fmt: skip


# what modules are called in memory differs from what save_pretrained writes
IN_MEMORY = ("ViT", "DINOv2, gated", "DINOv3", "BEiT", "BEiT, positions shared", "Swin")


def saved(net: nn.Module, folder: Path, how: str) -> Path:
    """The network as people have it: a hub's folder, or a file of what its modules are called in memory."""
    net.save_pretrained(folder)
    if how == "folder":
        return folder
    (folder / "model.safetensors").unlink()
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "folder") for name in MODELS), *((name, "file") for name in IN_MEMORY)]
)
def test_a_network_of_transformers_is_recognised_and_gives_the_features_it_gives_there(name, how, tmp_path, registry):
    made = MODELS[name]()
    net = shaken(made.net)
    loaded = load_backbone(saved(net, tmp_path / "tiny-net", how), registry)
    report, backbone = loaded.report, loaded.backbone.double()
    assert report.arch.partition("_")[0] == f"timm:{made.arch}".partition("_")[0]  # the nearest name of the family
    assert {k: report.options.get(k, v) for k, v in made.options.items()} == made.options
    assert (report.layout, report.matched, report.buffers, report.missing, report.leftover) == (
        "transformers", 1, 1, (), (),
    )  # fmt: skip
    x = PIXELS[..., : backbone.spec.image_size[0], : backbone.spec.image_size[1]] if "patch" in made.arch else PIXELS
    with torch.no_grad():
        wanted, patches = made.answer(net.double(), backbone.normalise(x))
        features = backbone(x)
    torch.testing.assert_close(features.pooled, wanted, rtol=1e-5, atol=1e-5)
    if patches is not None:
        torch.testing.assert_close(features.tokens, patches, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ what is said beside it


def vit(**values: Any) -> nn.Module:
    return shaken(of("ViTModel", "ViTConfig", **SMALL | values))


def clip(**values: Any) -> nn.Module:
    return shaken(of("CLIPVisionModel", "CLIPVisionConfig", **SMALL | values))


def rewrite(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


def test_what_no_tensor_shows_is_a_stated_default_without_a_config(tmp_path, registry):
    vit().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    alone = load_backbone(tmp_path / "model.safetensors", registry).report
    assert "no config.json beside it" in " ".join(alone.reason)
    assert alone.options["norm_eps"] == 1e-12
    given = load_backbone(tmp_path, registry, options={"num_heads": 4, "norm_eps": 1e-3}).backbone
    assert given.net.blocks[0].attn.num_heads == 4
    assert {m.eps for m in given.net.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}


@pytest.mark.parametrize("stale", [{"hidden_size": 48}, {"num_attention_heads": 5}, {"num_attention_heads": True}])
def test_a_config_that_is_not_of_these_tensors_is_not_believed(stale, tmp_path, registry):
    vit().save_pretrained(tmp_path)
    rewrite(tmp_path, **stale)
    assert load_backbone(tmp_path, registry).backbone.net.blocks[0].attn.num_heads == 1


def test_a_towers_config_that_leaves_its_classes_defaults_out_is_read_with_them(tmp_path, registry):
    """Older releases write of a nested object only what differs from its class."""
    net = shaken(of("CLIPModel", "CLIPConfig", vision_config=SMALL | {"hidden_size": 48, "num_attention_heads": 12},
                    text_config=TEXT))  # fmt: skip
    net.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    rewrite(tmp_path, vision_config={k: content["vision_config"][k] for k in ("hidden_size", "image_size")})
    options = load_backbone(tmp_path, registry).report.options
    assert (options["num_heads"], options["act_layer"], options["norm_eps"]) == (12, "quick_gelu", 1e-5)


def test_clips_pixels_are_normalised_as_clips_unless_the_preprocessor_says_otherwise(tmp_path, registry):
    clip().save_pretrained(tmp_path)
    assert load_backbone(tmp_path, registry).backbone.spec.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    rewrite(tmp_path, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    assert load_backbone(tmp_path, registry).backbone.spec.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("size", "arch"),
    [
        ((768, 12, 32, True), "timm:vit_base_patch32_clip_quickgelu_224"),
        ((1024, 24, 14, True), "timm:vit_large_patch14_clip_quickgelu_224"),
        ((768, 12, 16, False), "timm:vit_base_patch16_siglip_224"),
    ],
)
def test_towers_of_published_sizes_have_the_names_that_timm_has_for_them(size, arch, registry):
    width, depth, patch, classed = size
    kind = "CLIPVision" if classed else "SiglipVision"
    heads = {"num_attention_heads": width // 64, "num_hidden_layers": depth, "intermediate_size": 4 * width}
    with torch.device("meta"):
        net = of(f"{kind}Model", f"{kind}Config", hidden_size=width, patch_size=patch, image_size=224, **heads)
    state = State(net.state_dict(), "", File(Path("x.bin"), {}, ""))
    (read,) = registry.get("checkpoint", "transformers-clip")(state)
    assert read.arch == arch


def test_a_network_of_transformers_is_converted_to_timms_names_and_back(tmp_path, registry):
    clip().save_pretrained(tmp_path / "net")
    backbone = load_backbone(tmp_path / "net", registry).backbone
    exported = convert(backbone, "timm", tmp_path / "timm.safetensors", registry)
    options = backbone.spec.options
    assert load_backbone(exported.path, registry, options=options).backbone.identity == backbone.identity
    backbone.save(tmp_path / "backbone.safetensors")
    again = load_backbone(tmp_path / "backbone.safetensors", registry).backbone
    with torch.no_grad():
        torch.testing.assert_close(
            again(PIXELS.float()[..., :32, :32]).pooled, backbone(PIXELS.float()[..., :32, :32]).pooled
        )


# ------------------------------------------------------------------------------------------------ what is refused


def refused(folder: Path, registry: Registry) -> str:
    with pytest.raises(BackboneError) as caught:
        load_backbone(folder, registry)
    return f"{caught.value.problem} {caught.value.cause}"


SAM = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16, "image_size": 32}
OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BERT": (lambda: of("BertModel", "BertConfig", **TEXT), "a language model"),
    "YOLOS": (
        lambda: of("YolosModel", "YolosConfig", **SMALL | {"image_size": [32, 32]}),
        r"config.json says yolos.*detection_tokens",
    ),
    "ViLT": (lambda: of("ViltModel", "ViltConfig", **SMALL, vocab_size=9), r"config.json says vilt.*embeddings"),
    "SAM": (
        lambda: of("SamVisionModel", "SamVisionConfig", **SAM, patch_size=8, output_channels=8, window_size=2),
        "of the type sam_vision_model",
    ),
    "AST": (
        lambda: of("ASTModel", "ASTConfig", **{k: v for k, v in SMALL.items() if k != "image_size"}, max_length=32,
                   num_mel_bins=16),
        "RGB patches",
    ),
    "SegFormer": (
        lambda: of("SegformerModel", "SegformerConfig", hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
        "of the type segformer",
    ),
    "RegNet": (
        lambda: of("RegNetModel", "RegNetConfig", hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1], groups_width=8),
        "config.json says regnet",
    ),
    "ResNet of v1": (
        lambda: of("ResNetModel", "ResNetConfig", depths=[1, 1, 1, 1], downsample_in_bottleneck=True),
        "downsample_in_bottleneck",
    ),
    "an activation timm has not": (lambda: vit(hidden_act="gelu_10"), "gelu_10"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_of_these_networks_is_refused_with_what_it_is(name, tmp_path, registry):
    make, told = OTHERS[name]
    make().save_pretrained(tmp_path)
    assert re.search(told, refused(tmp_path, registry)), refused(tmp_path, registry)


def test_of_a_detector_its_resnet_is_read_and_the_report_says_so(tmp_path, registry):
    inner = {"depths": [1, 1, 1, 1], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
    small = {f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    backbone = transformers.ResNetConfig(**inner, out_features=["stage4"])
    config = {"use_timm_backbone": False, "backbone_config": backbone, "backbone": None, "d_model": 16}
    of("DetrModel", "DetrConfig", **config, **small).save_pretrained(tmp_path)
    report = load_backbone(tmp_path, registry).report
    assert (report.arch, report.matched) == ("timm:resnet18", 1)
    assert "the ResNet of a network of the type detr" in " ".join(report.reason)
    assert any("encoder.layers.0.self_attn" in name for name in report.unexpected)
    without(tmp_path, "embedder")
    assert "of the type detr" in refused(tmp_path, registry)


def without(folder: Path, part: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if part not in k}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("layer.1.", "of 1 layers, where config.json beside it says 2"),
        ("layer.0.attention.attention.key.weight", "missing, first blocks.0.attn.qkv.weight"),
        ("layer.0.output.dense", "first layer is not whole"),
        ("layer.1.output.dense", "missing, first blocks.1.mlp.fc2.weight"),
        ("position_embeddings", "positions"),
    ],
)
def test_a_network_of_transformers_with_a_part_missing_is_refused(part, told, tmp_path, registry):
    vit().save_pretrained(tmp_path)
    without(tmp_path, part)
    assert told in refused(tmp_path, registry)


@pytest.mark.parametrize("name", MODELS)
def test_no_layout_stumbles_over_a_file_in_which_a_tensor_is_missing(name, tmp_path, registry):
    MODELS[name]().net.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    beside = {"config.json": json.loads((tmp_path / "config.json").read_text())}
    layouts = [registry.get("checkpoint", entry.name) for entry in registry.entries("checkpoint")]
    for key in {re.sub(r"\.[1-9]\d*\.", ".1.", key): key for key in reversed(tensors)}.values():  # one of each kind
        rest = {k: v for k, v in tensors.items() if k != key}
        state = State(rest, "", File(Path("model.safetensors"), rest, "", beside=beside))
        assert all(isinstance(c.note, str) for layout in layouts for c in layout(state)), key


@pytest.mark.parametrize("shape", [(), (0,), (7,)], ids=str)
@pytest.mark.parametrize("name", ["ViT", "BEiT", "DINOv3", "SigLIP", "ConvNeXt", "ResNet", "Swin"])
def test_tensors_of_no_shape_as_sharded_training_leaves_them_are_refused(name, shape, tmp_path, registry):
    MODELS[name]().net.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: torch.zeros(shape) if v.ndim > 1 else v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    refused(tmp_path, registry)


def test_the_window_of_swins_second_version_is_never_guessed(tmp_path, registry):
    of("Swinv2Model", "Swinv2Config", **WINDOWS).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "only a config.json beside it gives" in refused(tmp_path, registry)


# --------------------------------------------------------------------------------------------------- OpenAI's names


def openai(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors of transformers' CLIP under the names that OpenAI and OpenCLIP give them."""
    theirs = net.state_dict()
    out: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if ".self_attn." in name and not name.endswith(("q_proj.weight", "q_proj.bias")) and "out_proj" not in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([theirs[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"])
        for old, new in (
            (r"^embeddings\.class_embedding", "class_embedding"), (r"^embeddings\.patch_embedding", "conv1"),
            (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
            (r"^pre_layrnorm", "ln_pre"),
            (r"^post_layernorm", "ln_post"), (r"^encoder\.layers\.", "transformer.resblocks."),
            (r"layer_norm", "ln_"), (r"self_attn\.q_proj\.", "attn.in_proj_"),
            (r"self_attn\.out_proj", "attn.out_proj"),
            (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
        ):  # fmt: skip
            name = re.sub(old, new, name)
        out[prefix + name] = tensor
    return out


@pytest.mark.parametrize("who", ["OpenAI", "OpenCLIP"])
def test_clip_under_openais_names_gives_the_features_that_transformers_gives(who, tmp_path, registry):
    size = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 64}
    net = clip(**size, hidden_act="quick_gelu" if who == "OpenAI" else "gelu")
    text = {
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8),
        "token_embedding.weight": torch.ones(9, 8),
    }
    numbers = {k: torch.tensor(7) for k in ("input_resolution", "context_length", "vocab_size")}
    state = openai(net, "visual.") | {"visual.proj": torch.ones(128, 8)} | text | (numbers if who == "OpenAI" else {})
    torch.save(state, tmp_path / "clip.pt")
    loaded = load_backbone(tmp_path / "clip.pt", registry)
    backbone = loaded.backbone.double()
    assert (loaded.report.matched, loaded.report.leftover, loaded.report.layout) == (1, (), "clip")
    assert any("act_layer=gelu is a guess" in guess for guess in loaded.report.guesses) == (who == "OpenCLIP")
    with torch.no_grad():
        wanted, _ = pooler(net.double(), backbone.normalise(PIXELS[..., :32, :32]))
        torch.testing.assert_close(backbone(PIXELS[..., :32, :32]).pooled, wanted, rtol=1e-5, atol=1e-5)


def test_open_clips_own_config_says_heads_and_activation(tmp_path, registry):
    torch.save(openai(clip(hidden_size=128), "visual."), tmp_path / "open_clip_pytorch_model.bin")
    tower = {"width": 128, "head_width": 32}
    rewrite(tmp_path, "open_clip_config.json", model_cfg={"quick_gelu": True, "vision_cfg": tower})
    options = load_backbone(tmp_path, registry).report.options
    assert (options["num_heads"], options["act_layer"]) == (4, "quick_gelu")
