"""Networks of libraries, tiny and from their configurations: nothing is downloaded.

Every library is optional; ``missing`` says which are not there. Inputs are small, weights perturbed.
"""

import importlib
import re
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from entries import LAYERWISE, Entry
from torch import Tensor, nn

ENTRIES: list[Entry] = []
DERIVED = dict.fromkeys(LAYERWISE, "is changed by")
LIBRARIES = ("transformers", "peft", "timm", "torchvision", "torch_geometric", "snntorch")
N, T = 2, 6


@cache
def library(name: str) -> types.ModuleType | None:
    """A library, if it imports; torchvision's fused operators, which need its own build of PyTorch, are left out."""
    torchvision_is_whole()
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@cache
def torchvision_is_whole() -> torch.library.Library | None:
    """Declare the operators that torchvision's Python part registers for and that its compiled part did not bring."""
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(20):
        try:
            importlib.import_module("torchvision")
        except ImportError:
            return None
        except RuntimeError as error:
            operator = re.match(r"operator torchvision::(\w+) does not exist", str(error))
            if operator is None:
                return None
            declared.define(f"{operator[1]}(Tensor x) -> Tensor")
            for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
        else:
            return declared
    return None


class _Wide(types.ModuleType):
    """torch, but what it calls float32 is float64: some models normalise and route in float32 whatever they are in."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_WIDE = _Wide("torch")


def entry(family: str, name: str, make: Callable, **options: Any) -> None:
    ENTRIES.append(Entry(name=name, family=family, make=make, slow=True, perturbed=0.05, **options))


# --- Hugging Face -----------------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 19,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip


def tokens(seed: int = 5, high: int = 19, low: int = 3) -> Tensor:
    return torch.randint(low, high, (N, T), generator=torch.Generator().manual_seed(seed))


def pixels(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(N, channels, size, size, generator=torch.Generator().manual_seed(6))


def hugging(name: str, inputs: Callable[[], dict[str, Any]], output: Any = "logits", *,
            refused: dict[str, str] | None = None, inputs_want: bool = True, end: str | None = None,
            cut: tuple[str, ...] = (), channels: bool = False, **configuration: Any) -> None:  # fmt: skip
    """Register a model by the name of its class; the configuration's class is that of the model."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        transformers = library("transformers")
        assert transformers is not None
        kind = getattr(transformers, name)
        for module in {sys.modules[base.__module__] for base in kind.__mro__ if base.__module__.startswith("transf")}:
            module.torch = _WIDE
        settings = kind.config_class(**configuration)
        settings._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
        settings._experts_implementation = "eager"  # grouped products are of float32 and bfloat16 alone
        return kind(settings), inputs()

    entry("transformers", name, make, output=output, refused=refused or {}, inputs=inputs_want, end=end, cut=cut,
          channels=channels)  # fmt: skip


def text() -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(N, T, dtype=torch.long)}


def causal() -> dict[str, Any]:
    return {"input_ids": tokens()}


def pairs() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(8)[:, :5]}


decoders = partial(hugging, inputs=causal, **SMALL)
hugging("GPT2LMHeadModel", causal, n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=19, use_cache=False)
hugging("GPTNeoForCausalLM", causal, hidden_size=16, num_layers=2, num_heads=2, vocab_size=19, window_size=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=16, use_cache=False)  # fmt: skip
hugging("GPTJForCausalLM", causal, n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=19, rotary_dim=4,
        use_cache=False)  # fmt: skip
hugging("GPTBigCodeForCausalLM", causal, n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=19, use_cache=False)
decoders("GPTNeoXForCausalLM")
decoders("OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=12)
hugging("BloomForCausalLM", causal, hidden_size=16, n_layer=2, n_head=2, vocab_size=19, use_cache=False)
hugging("FalconForCausalLM", causal, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=19,
        use_cache=False)  # fmt: skip
hugging("MptForCausalLM", causal, d_model=16, n_layers=2, n_heads=2, vocab_size=19, max_seq_len=16, use_cache=False)
for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi", "Phi3", "Gemma", "Gemma2", "Olmo2", "StableLm", "Granite"):
    more: dict[str, Any] = {"head_dim": 8} if name in ("Qwen3", "Gemma", "Gemma2") else {}
    more |= {"end": "lm_head"} if name == "Gemma2" else {}  # its logits are capped
    decoders(f"{name}ForCausalLM", num_key_value_heads=1 if name != "Phi" else 2, **more)
mixture = {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2}
decoders("MixtralForCausalLM", **mixture)
decoders("Qwen2MoeForCausalLM", moe_intermediate_size=8, shared_expert_intermediate_size=8, **mixture)
decoders("OlmoeForCausalLM", **mixture)
decoders("GraniteMoeForCausalLM", **mixture)
decoders("JetMoeForCausalLM", kv_channels=8, **mixture)  # it sorts the rows
decoders("GptOssForCausalLM", head_dim=8, **mixture)
decoders("DeepseekV3ForCausalLM", kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
         n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8,
         first_k_dense_replace=1)  # fmt: skip
hugging("MambaForCausalLM", causal, hidden_size=8, num_hidden_layers=2, vocab_size=19, state_size=4, time_step_rank=3,
        use_cache=False, refused=DERIVED)  # fmt: skip
hugging("Mamba2ForCausalLM", causal, hidden_size=8, num_hidden_layers=2, vocab_size=19, state_size=4, num_heads=2,
        head_dim=8, n_groups=1, chunk_size=4, use_cache=False)  # fmt: skip
hugging("RwkvForCausalLM", causal, hidden_size=16, num_hidden_layers=2, vocab_size=19, context_length=16,
        use_cache=False)  # fmt: skip
decoders(
    "RecurrentGemmaForCausalLM", end="lm_head", num_key_value_heads=1, head_dim=8, lru_width=16, num_hidden_layers=3
)
decoders("XGLMForCausalLM", d_model=16, num_layers=2, attention_heads=2, ffn_dim=24)
hugging("XLNetLMHeadModel", causal, d_model=16, n_layer=2, n_head=2, d_inner=24, vocab_size=19,
        refused=DERIVED)  # fmt: skip
hugging("T5ForConditionalGeneration", pairs, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=19,
        decoder_start_token_id=0, use_cache=False)  # fmt: skip
hugging("SwitchTransformersForConditionalGeneration", pairs, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        vocab_size=19, num_experts=3, decoder_start_token_id=0, use_cache=False)  # fmt: skip
seq2seq = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 19,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
           "use_cache": False}  # fmt: skip
hugging("BartModel", pairs, "last_hidden_state", max_position_embeddings=16, **seq2seq)
for name in ("MarianMTModel", "PegasusForConditionalGeneration", "MBartForConditionalGeneration"):
    hugging(name, pairs, max_position_embeddings=16, **seq2seq)
encoders = partial(hugging, inputs=text, **SMALL)
encoders("BertForMaskedLM")
encoders("RobertaForMaskedLM", type_vocab_size=1)
encoders("ElectraForMaskedLM", embedding_size=12)
encoders("AlbertForMaskedLM", embedding_size=12)
encoders("MPNetForMaskedLM")
encoders("DebertaForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"])
encoders("DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4)
encoders("ConvBertForMaskedLM", embedding_size=16, conv_kernel_size=3, head_ratio=1)
hugging("FNetForMaskedLM", causal, **SMALL)
encoders("ModernBertForMaskedLM", local_attention=4, global_attn_every_n_layers=2)
encoders("LongformerForMaskedLM", attention_window=4)
encoders("NystromformerForMaskedLM", num_landmarks=3, segment_means_seq_len=6, conv_kernel_size=3)
encoders("SqueezeBertForMaskedLM", embedding_size=16)
encoders("RoFormerForMaskedLM", embedding_size=16)
encoders("EsmForMaskedLM", mask_token_id=3, position_embedding_type="rotary", token_dropout=False)
hugging("DistilBertForMaskedLM", text, dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=19)
hugging("XLMWithLMHeadModel", text, emb_dim=16, n_layers=2, n_heads=2, n_words=19, max_position_embeddings=16)
hugging("PerceiverForMaskedLM", text, d_model=16, d_latents=16, num_latents=4, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2, vocab_size=19, max_position_embeddings=8,
        qk_channels=8, v_channels=16)  # fmt: skip

sight = {"image_size": 16, "patch_size": 8, "num_labels": 5, **{k: SMALL[k] for k in (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}}  # fmt: skip


def seen() -> dict[str, Any]:
    return {"pixel_values": pixels()}


for name in ("ViT", "DeiT", "Beit", "Data2VecVision", "Dinov2", "ViTMSN"):
    hugging(f"{name}ForImageClassification", seen, **sight)
hugging("BeitModel", seen, "last_hidden_state", use_relative_position_bias=True, layer_scale_init_value=0.5, **sight)
hugging("ViTMAEModel", seen, "last_hidden_state", mask_ratio=0.5, **sight)
for name in ("Swin", "Swinv2"):
    hugging(f"{name}ForImageClassification", seen, image_size=16, patch_size=2, embed_dim=8, depths=[2, 1],
            num_heads=[2, 2], window_size=4, num_labels=5)  # fmt: skip
hugging("ConvNextForImageClassification", seen, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=5)
hugging("ConvNextV2ForImageClassification", seen, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=5)
hugging("ResNetForImageClassification", lambda: {"pixel_values": pixels(32)}, embedding_size=4, hidden_sizes=[4, 8],
        depths=[1, 1], layer_type="basic", num_labels=5)  # fmt: skip
hugging("RegNetForImageClassification", lambda: {"pixel_values": pixels(32)}, embedding_size=4, hidden_sizes=[4, 8],
        depths=[1, 1], groups_width=4, num_labels=5)  # fmt: skip
hugging("PoolFormerForImageClassification", lambda: {"pixel_values": pixels(32)}, hidden_sizes=[4, 8, 8, 8],
        depths=[1, 1, 1, 1], num_labels=5)  # fmt: skip
hugging("SegformerForSemanticSegmentation", lambda: {"pixel_values": pixels(40)}, num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[2, 1], hidden_sizes=[4, 8], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=12, num_labels=5, channels=True)  # fmt: skip
hugging("PvtV2ForImageClassification", lambda: {"pixel_values": pixels(32)}, image_size=32, hidden_sizes=[4, 8, 8, 8],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2], sr_ratios=[2, 1, 1, 1], mlp_ratios=[2, 2, 2, 2],
        num_labels=5)  # fmt: skip
hugging("MobileViTForImageClassification", lambda: {"pixel_values": pixels(64)}, hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 8], num_attention_heads=2, image_size=64, num_labels=5)  # fmt: skip
hugging("MobileNetV2ForImageClassification", lambda: {"pixel_values": pixels(32)}, depth_multiplier=0.1, image_size=32,
        num_labels=5, min_depth=4, depth_divisible_by=4)  # fmt: skip
hugging("LevitForImageClassification", lambda: {"pixel_values": pixels(64)}, image_size=64, hidden_sizes=[8, 8, 8],
        num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[4, 4, 4], num_labels=5)  # fmt: skip
hugging("BitForImageClassification", lambda: {"pixel_values": pixels(32)}, embedding_size=32, num_groups=4,
        hidden_sizes=[32, 32], depths=[1, 1], num_labels=5,
        refused=DERIVED)  # fmt: skip
hugging("YolosForObjectDetection", seen, "logits", num_detection_tokens=3, image_size=[16, 16],
        **{k: v for k, v in sight.items() if k != "image_size"})  # fmt: skip
PAIRS = {"dfa": "needs the batch"}  # the logits of all pairs of a batch
two = {"text_config": SMALL, "vision_config": {**sight, "projection_dim": 8}, "projection_dim": 8}


def both() -> dict[str, Any]:
    return {**text(), "pixel_values": pixels()}


hugging("CLIPModel", both, lambda result: result["logits_per_image"], refused=PAIRS, **two)
hugging("CLIPVisionModelWithProjection", seen, "image_embeds", projection_dim=8, **sight)
hugging("SiglipModel", both, lambda result: result["logits_per_image"], refused=PAIRS, **two)


def waves() -> dict[str, Any]:
    return {"input_values": torch.randn(N, 200, generator=torch.Generator().manual_seed(6))}


sound = {"conv_dim": (8, 8), "conv_stride": (4, 3), "conv_kernel": (8, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
         "mask_time_prob": 0.0, **{k: v for k, v in SMALL.items() if k != "use_cache"}}  # fmt: skip
for name in ("Wav2Vec2ForCTC", "HubertForCTC", "WavLMForCTC", "UniSpeechForCTC", "SEWForCTC"):
    hugging(name, waves, inputs_want=False, **sound)  # they set requires_grad of it themselves
hugging("WhisperForConditionalGeneration", lambda: {
            "input_features": torch.randn(N, 10, 14, generator=torch.Generator().manual_seed(6)),
            "decoder_input_ids": tokens()},
        num_mel_bins=10, max_source_positions=7, max_target_positions=16, **seq2seq)  # fmt: skip
hugging("ASTForAudioClassification", lambda: {
            "input_values": torch.randn(N, 16, 8, generator=torch.Generator().manual_seed(6))},
        max_length=16, num_mel_bins=8, frequency_stride=4, time_stride=4, **{**sight, "patch_size": 4})  # fmt: skip
hugging("DecisionTransformerModel", lambda: {
            "states": torch.randn(N, T, 4), "actions": torch.randn(N, T, 2), "rewards": torch.randn(N, T, 1),
            "returns_to_go": torch.randn(N, T, 1), "timesteps": torch.arange(T).expand(N, T),
            "attention_mask": torch.ones(N, T)},
        "action_preds", state_dim=4, act_dim=2, hidden_size=16, n_layer=1, n_head=2, max_ep_len=16,
        n_positions=32, end="predict_action.0")  # fmt: skip
hugging("PatchTSTForPrediction", lambda: {"past_values": torch.randn(N, 16, 2)}, "prediction_outputs",
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=8, num_attention_heads=2,
        num_hidden_layers=1, ffn_dim=12, prediction_length=3, loss="mse", scaling=None)  # fmt: skip
hugging("TimesformerForVideoClassification", lambda: {"pixel_values": torch.randn(N, 4, 3, 16, 16)}, num_frames=4,
        **sight)  # fmt: skip

# --- PEFT -------------------------------------------------------------------------------------------------------------


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    peft = library("peft")
    assert peft is not None
    chosen = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**chosen))


def adapter(name: str, base: str, cut: tuple[str, ...] = (), **options: Any) -> None:
    plain = next(e for e in ENTRIES if e.name == base)

    def make() -> tuple[nn.Module, Any]:
        model, x = plain.make()
        return adapted(model, **options), x

    entry("peft", name, make, output="logits", cut=cut)


adapter("LoRA on GPT-2", "GPT2LMHeadModel", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
adapter("LoRA on Llama", "LlamaForCausalLM", target_modules=["q_proj", "v_proj"])
adapter("LoRA on Llama, modules saved", "LlamaForCausalLM", target_modules="all-linear", modules_to_save=["lm_head"])
adapter("DoRA on Llama", "LlamaForCausalLM", target_modules=["q_proj"], use_dora=True)
adapter("LoRA on BERT", "BertForMaskedLM", target_modules=["query", "value"], bias="lora_only")

# --- timm and torchvision ---------------------------------------------------------------------------------------------


def timm_model(name: str, size: int = 32, refused: dict[str, str] | None = None, cut: tuple[str, ...] = (),
               **options: Any) -> None:  # fmt: skip
    def make() -> tuple[nn.Module, Tensor]:
        timm = library("timm")
        assert timm is not None
        return timm.create_model(name, num_classes=5, **options), pixels(size)

    entry("timm", name, make, refused=refused or {}, cut=cut)


def mixer(gated: bool) -> tuple[nn.Module, Tensor]:
    timm = library("timm.models.mlp_mixer")
    assert timm is not None
    gating = {"block_layer": timm.SpatialGatingBlock, "mlp_layer": timm.GatedMlp, "mlp_ratio": 6} if gated else {}
    return timm.MlpMixer(img_size=32, embed_dim=16, num_blocks=1, num_classes=5, **gating), pixels(32)


entry("timm", "MlpMixer", lambda: mixer(False))
entry("timm", "gMLP", lambda: mixer(True))
tiny_vit = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
timm_model("vit_tiny_patch16_224", **tiny_vit, init_values=0.3)
timm_model("eva02_tiny_patch14_224", **tiny_vit)
timm_model("deit_tiny_distilled_patch16_224", **tiny_vit)
timm_model("beit_base_patch16_224", **tiny_vit)
timm_model("cait_xxs24_224", **tiny_vit)
timm_model("xcit_nano_12_p16_224", **tiny_vit)
timm_model("swin_tiny_patch4_window7_224", 32, img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
timm_model("swinv2_tiny_window8_256", 32, img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
timm_model("resnet10t", channels=(8, 8, 16, 16))
timm_model("nf_resnet26", refused=DERIVED)
timm_model("efficientnet_lite0", 32)
timm_model("mobilenetv3_small_050")


def vision_model(name: str, size: int = 32, output: Any = None, **options: Any) -> None:
    def make() -> tuple[nn.Module, Tensor]:
        torchvision = library("torchvision")
        assert torchvision is not None
        import torchvision.models

        return getattr(torchvision.models, name)(**options), pixels(size)

    entry("torchvision", name, make, output=output)


small_swin = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": [4, 4]}
vision_model("VisionTransformer", image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=24,
             num_classes=5)  # fmt: skip
vision_model("SwinTransformer", num_classes=5, **small_swin)
vision_model("resnet18", num_classes=5, width_per_group=64)
vision_model("squeezenet1_1", num_classes=5)
vision_model("shufflenet_v2_x0_5", num_classes=5)

# --- graphs -----------------------------------------------------------------------------------------------------------


class OnGraph(nn.Module):
    """Two convolutions of one graph, and a layer."""

    def __init__(self, one: nn.Module, two: nn.Module, inner: int, edges: Tensor, more: tuple = ()) -> None:
        super().__init__()
        self.one, self.two, self.last = one, two, nn.Linear(inner, 3)
        self.edges, self.more = edges, more

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x, self.edges, *self.more).relu()
        return self.last(self.two(h, self.edges, *self.more).relu())


def graph(name: str, convolution: Callable, outer: int = 6, more: Callable = tuple) -> None:
    def make() -> tuple[nn.Module, Tensor]:
        geometric = library("torch_geometric.nn")
        assert geometric is not None
        edges = torch.randint(7, (2, 15), generator=torch.Generator().manual_seed(1))
        net = OnGraph(convolution(geometric, 5), convolution(geometric, outer), outer, edges, more())
        return net, torch.randn(7, 5)

    entry("torch_geometric", name, make)


def perceptron(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, 7), nn.ReLU(), nn.Linear(7, 6))


graph("GCNConv", lambda g, d: g.GCNConv(d, 6))
graph("SAGEConv", lambda g, d: g.SAGEConv(d, 6))
graph("GATConv", lambda g, d: g.GATConv(d, 3, heads=2))
graph("GATv2Conv", lambda g, d: g.GATv2Conv(d, 3, heads=2))
graph("TransformerConv", lambda g, d: g.TransformerConv(d, 3, heads=2, beta=True))
graph("GINConv", lambda g, d: g.GINConv(perceptron(d), train_eps=True))
graph("GraphConv", lambda g, d: g.GraphConv(d, 6))
graph("ChebConv", lambda g, d: g.ChebConv(d, 6, K=3))
graph("TAGConv", lambda g, d: g.TAGConv(d, 6, K=2))
graph("EdgeConv", lambda g, d: g.EdgeConv(perceptron(2 * d)))
graph("RGCNConv", lambda g, d: g.RGCNConv(d, 6, num_relations=2), more=lambda: (torch.arange(15) % 2,))
graph("NNConv", lambda g, d: g.NNConv(d, 6, nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 6 * d))),
      more=lambda: (torch.randn(15, 2, dtype=torch.float64),))  # fmt: skip
graph("GatedGraphConv", lambda g, d: g.GatedGraphConv(6, 2))
graph("ARMAConv", lambda g, d: g.ARMAConv(d, 6, num_stacks=2, num_layers=2))

# --- spiking ----------------------------------------------------------------------------------------------------------


class Spiking(nn.Module):
    """Leaky neurons, step by step; the potential of the last ones, every step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        snn = library("snntorch")
        assert snn is not None
        from snntorch import surrogate

        neuron: dict[str, Any] = {"spike_grad": surrogate.fast_sigmoid()}
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        if kind == "RLeaky":
            self.hidden = snn.RLeaky(beta=0.8, linear_features=8, **neuron)
        else:
            self.hidden = getattr(snn, kind)(beta=0.8, learn_beta=True, **neuron)
        self.out, self.kind = snn.Leaky(beta=0.7, **neuron), kind

    def forward(self, x: Tensor) -> Tensor:
        spikes, state = self.hidden.reset_mem() if self.kind == "RLeaky" else (None, self.hidden.reset_mem())
        potential, potentials = self.out.reset_mem(), []
        for given in x.unbind(1):
            current = self.first(given)
            if self.kind == "RLeaky":
                spikes, state = self.hidden(current, spikes.double(), state)
            else:
                spikes, state = self.hidden(current, state)
            _, potential = self.out(self.last(spikes.double()), potential)
            potentials.append(potential)
        return torch.stack(potentials, 1)


for kind in ("Leaky", "RLeaky"):
    entry("snntorch", kind, lambda kind=kind: (Spiking(kind), 2 * torch.randn(N, T, 5)), steps=T)
