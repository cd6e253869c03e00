"""Where weights come from: only what is needed is read, what does not fit is named, and an identity says which."""

import hashlib
import json
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import InputError
from ebft_mega.model.rotary import inverse_frequencies
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.tensor_fit import check_fit, with_own_head
from ebft_mega.model.weights.weight_files import stored_tensors
from ebft_mega.model.weights.weight_sources import RandomWeights, SafetensorsWeights, identity
from tests.conftest import tiny_config
from tests.unit.planted import Bomb

ARCHITECTURE = Architecture.from_hf(tiny_config("llama"), "test")
EMBEDDING = "model.embed_tokens.weight"


def write(directory, architecture=ARCHITECTURE, seed=1, dtype=torch.float32, shard_bytes=10**9):
    source = RandomWeights(architecture, seed)
    pairs = ((name, source.tensor(name)) for name in hf_shapes(architecture))
    write_model(directory, architecture, pairs, dtype, shard_bytes=shard_bytes)
    return directory


def add(directory, **tensors):
    """Change the only file of a directory."""
    path = directory / "model.safetensors"
    save_file({**load_file(path), **{name.replace("__", "."): value for name, value in tensors.items()}}, path)


def problems_of(directory, architecture=ARCHITECTURE, num_layers=None):
    with pytest.raises(InputError) as caught:
        SafetensorsWeights(directory, architecture, num_layers)
    return [f"{problem.key}: {problem.found}; {problem.expected}" for problem in caught.value.problems]


def whole_identity(source):
    return identity({name: source.digest(name) for name in source.digest_names()})


@given(
    name=st.sampled_from(list(hf_shapes(ARCHITECTURE))),
    corners=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=2, max_size=2),
    is_random=st.booleans(),
)
def test_a_part_is_the_slice_of_the_whole(tmp_path_factory, name, corners, is_random):
    source = RandomWeights(ARCHITECTURE, 1)
    if not is_random:
        source = SafetensorsWeights(write(tmp_path_factory.mktemp("model")), ARCHITECTURE)
    whole = source.tensor(name)
    box = tuple(slice(min(*ends, size), min(max(ends), size)) for ends, size in zip(corners, whole.shape, strict=False))
    part = source.part(name, box)
    assert part.shape == whole[box].shape and torch.equal(part, whole[box])


def test_a_stage_reads_its_own_layers_and_no_more(groups, tmp_path):
    """What the second of two stages asks for, counted."""
    reads = []

    class Counting(SafetensorsWeights):
        def tensor(self, name):
            raise AssertionError("a whole tensor was read")

        def part(self, name, box):
            reads.append((name, box))
            return super().part(name, box)

    source = Counting(write(tmp_path / "model"), ARCHITECTURE)
    stage = Stage(ARCHITECTURE, StageShape.of_policy(ARCHITECTURE, 1, 2), groups, torch.float32)
    load_weights(stage, source)
    assert {name.split(".")[2] for name, _ in reads if "layers" in name} == {"2", "3"}
    assert sum(name == EMBEDDING for name, _ in reads) == 1, "the copy that a tied head on another stage needs"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_read_as_they_are(groups, tmp_path, dtype):
    source = SafetensorsWeights(write(tmp_path / "model", dtype=dtype), ARCHITECTURE)
    stage = Stage(ARCHITECTURE, StageShape.whole(ARCHITECTURE), groups, torch.float32)
    load_weights(stage, source)
    expected = RandomWeights(ARCHITECTURE, 1).tensor(EMBEDDING).to(dtype).float()
    assert torch.equal(stage.embedding.weight, expected)
    assert set(source.dtypes.values()) == {dtype}


def test_what_does_not_fit_is_named_at_once(tmp_path):
    directory = write(tmp_path / "model")
    add(
        directory,
        model__norm__weight=torch.zeros(32, dtype=torch.int8),
        model__layers__0__mlp__up_proj__weight=torch.zeros(48, 32, dtype=torch.float8_e4m3fn),
        model__layers__1__mlp__up_proj__weight=torch.zeros(7),
        model__layers__0__self_attn__q_norm__weight=torch.zeros(8),
        model__vision__weight=torch.zeros(8),
    )
    assert sorted(problems_of(directory)) == [
        "model.layers.0.mlp.up_proj.weight: dtype F8_E4M3; one of F32, BF16, F16, F64",
        "model.layers.0.self_attn.q_norm.weight: a tensor; none of this name in a llama model",
        "model.layers.1.mlp.up_proj.weight: shape (7,); shape (48, 32)",
        "model.norm.weight: dtype I8; one of F32, BF16, F16, F64",
        "model.vision.weight: a tensor; none of this name in a llama model",
    ]


def test_surplus_tensors_that_change_nothing_do_no_harm(groups, tmp_path):
    directory = write(tmp_path / "model")
    embedding = RandomWeights(ARCHITECTURE, 1).tensor(EMBEDDING)
    frequencies = inverse_frequencies(ARCHITECTURE)
    add(
        directory,
        lm_head__weight=embedding.clone(),
        model__layers__0__self_attn__rotary_emb__inv_freq=frequencies,
        model__layers__1__self_attn__rotary_emb__inv_freq=frequencies.to(torch.bfloat16),
        model__layers__0__self_attn__o_proj__bias=torch.zeros(32),
    )
    stage = Stage(ARCHITECTURE, StageShape.whole(ARCHITECTURE), groups, torch.float32)
    load_weights(stage, SafetensorsWeights(directory, ARCHITECTURE))
    assert torch.equal(stage.embedding.weight, embedding)
    (note,) = check_fit(directory, stored_tensors(directory)[0], ARCHITECTURE).notes
    assert note.startswith("left out, because they change nothing: ") and note.count("inv_freq") == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lm_head.weight", torch.full((131, 32), 7.0), "the values of model.embed_tokens.weight"),
        ("lm_head.weight", torch.zeros(131, 31), "the values of model.embed_tokens.weight"),
        ("lm_head.bias", torch.zeros(131), "none of this name in a llama model"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4), "the rotary frequencies that config.json"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(5), "the rotary frequencies that config.json"),
        ("model.layers.0.self_attn.o_proj.bias", torch.tensor([0.0] * 31 + [1e-4]), "zeros, or no such tensor"),
        ("model.norm.bias", torch.ones(32), "zeros, or no such tensor: a llama model has no bias there"),
        ("model.layers.4.mlp.up_proj.weight", torch.zeros(48, 32), "of 4 layers (num_hidden_layers)"),
        ("embed_tokens.weight", torch.zeros(131, 32), "(its names begin with model.)"),
        ("vision_tower.weight", torch.zeros(3), "none of this name in a llama model"),
    ],
)
def test_surplus_tensors_that_may_change_something_are_refused(tmp_path, name, value, words):
    directory = write(tmp_path / "model")
    add(directory, **{name: value})
    (problem,) = problems_of(directory)
    assert problem.startswith(f"{name}: ") and words in problem
    # A feature network reads neither head nor upper layers, but the file is the same.
    assert problems_of(directory, num_layers=2) == [problem]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_head_is_compared_by_its_values_whatever_its_dtype(tmp_path, dtype):
    directory = write(tmp_path / "model", dtype=torch.bfloat16)
    embedding = load_file(directory / "model.safetensors")[EMBEDDING].float()
    embedding[embedding.abs() < 1e-3] = 0.25  # float16 has fewer small numbers
    add(directory, **{EMBEDDING: embedding.to(torch.bfloat16), "lm_head.weight": embedding.to(dtype)})
    assert with_own_head(ARCHITECTURE, stored_tensors(directory)[0]) == (ARCHITECTURE, ())
    other = embedding.clone()
    other[-1, -1] += 0.25
    add(directory, **{"lm_head.weight": other.to(dtype)})
    untied, (note,) = with_own_head(ARCHITECTURE, stored_tensors(directory)[0])
    assert not untied.tie_word_embeddings and "tie_word_embeddings" in note
    assert torch.equal(SafetensorsWeights(directory, untied).tensor("lm_head.weight"), other.to(dtype))


def test_a_head_that_is_not_finite_is_one_of_its_own_and_refused_when_it_is_read(groups, tmp_path):
    directory = write(tmp_path / "model")
    head = RandomWeights(ARCHITECTURE, 1).tensor(EMBEDDING)
    head[3, 3] = float("nan")
    add(directory, **{"lm_head.weight": head})
    untied, _ = with_own_head(ARCHITECTURE, stored_tensors(directory)[0])
    stage = Stage(untied, StageShape.whole(untied), groups, torch.float32)
    with pytest.raises(InputError, match=r"lm_head.weight: found values that are infinite or no numbers") as caught:
        load_weights(stage, SafetensorsWeights(directory, untied))
    assert len(caught.value.problems) == 1 and caught.value.exit_code == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_named_when_weights_are_read(groups, tmp_path, value, dtype):
    directory = write(tmp_path / "model", dtype=dtype)
    wrong = load_file(directory / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.2.self_attn.k_proj.weight"):
        wrong[name].view(-1)[-1] = value
    save_file(wrong, directory / "model.safetensors")
    stage = Stage(ARCHITECTURE, StageShape.whole(ARCHITECTURE), groups, torch.float32)
    with pytest.raises(InputError) as caught:
        load_weights(stage, SafetensorsWeights(directory, ARCHITECTURE))
    assert [(problem.where, problem.key) for problem in caught.value.problems] == [
        (str(directory / "model.safetensors"), "model.layers.2.self_attn.k_proj.weight"),
        (str(directory / "model.safetensors"), "model.norm.weight"),
    ]


def test_values_that_the_dtype_of_training_cannot_hold_are_named_when_weights_are_read(groups, tmp_path):
    directory = write(tmp_path / "model")
    large = load_file(directory / "model.safetensors")
    large["model.norm.weight"][5] = -3.4e38  # beyond bfloat16 after rounding, within float32
    save_file(large, directory / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        stage = Stage(ARCHITECTURE, StageShape.whole(ARCHITECTURE), groups, dtype)
        if dtype is torch.float32:
            load_weights(stage, SafetensorsWeights(directory, ARCHITECTURE))
            continue
        with pytest.raises(InputError, match=r"model.norm.weight: found values beyond the range of bfloat16"):
            load_weights(stage, SafetensorsWeights(directory, ARCHITECTURE))


def test_random_weights_that_are_not_finite_are_named(groups):
    architecture = Architecture.from_hf({**ARCHITECTURE.hf_config, "initializer_range": 1e39}, "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    with pytest.raises(InputError, match="random weights of seed 3: model.embed_tokens.weight: found values that"):
        load_weights(stage, RandomWeights(architecture, 3))


def test_layers_that_are_not_needed_may_be_missing(tmp_path):
    directory = write(tmp_path / "model")
    path = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".3." not in name}
    save_file(kept, path)
    assert len(problems_of(directory)) == 9
    SafetensorsWeights(directory, ARCHITECTURE, num_layers=3)


def test_an_identity_is_that_of_the_contents_wherever_they_lie(tmp_path):
    first = write(tmp_path / "model", shard_bytes=20_000)
    shutil.copytree(first, tmp_path / "elsewhere")
    sources = [SafetensorsWeights(tmp_path / name, ARCHITECTURE) for name in ("model", "elsewhere")]
    assert len(sources[0].digest_names()) > 2
    assert whole_identity(sources[0]) == whole_identity(sources[1])
    path = tmp_path / "elsewhere" / sources[1].digest_names()[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert whole_identity(sources[0]) != whole_identity(sources[1])
    chosen = sources[0].digest_names()[0]
    assert sources[0].digest(chosen) == hashlib.sha256((first / chosen).read_bytes()).hexdigest()


def test_the_identity_of_random_weights_is_that_of_their_values():
    small = Architecture.from_hf(tiny_config("llama", num_hidden_layers=1), "test")
    source = RandomWeights(small, 3)
    assert source.digest_names() == list(hf_shapes(small))
    name = source.digest_names()[0]
    assert source.digest(name) == hashlib.sha256(source.tensor(name).numpy().tobytes()).hexdigest()
    wider = Architecture.from_hf(tiny_config("llama", num_hidden_layers=1, initializer_range=0.1), "test")
    assert len({whole_identity(RandomWeights(a, seed)) for a in (small, wider) for seed in (3, 4)}) == 4


@given(st.dictionaries(st.sampled_from("abcd"), st.sampled_from(("00", "11")), min_size=1), st.randoms())
def test_an_identity_knows_no_order_but_every_pair(digests, random):
    pairs = list(digests.items())
    random.shuffle(pairs)
    assert identity(dict(pairs)) == identity(digests)
    chosen = random.choice(sorted(digests))
    assert identity({**digests, chosen: "22"}) != identity(digests)
    assert identity({**digests, "e": "00"}) != identity(digests)
    renamed = {"e" if name == chosen else name: digest for name, digest in digests.items()}
    assert identity(renamed) != identity(digests)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin"])
def test_pickles_beside_the_weights_are_not_opened(groups, tmp_path, name):
    directory = write(tmp_path / "model")
    (directory / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    stage = Stage(ARCHITECTURE, StageShape.whole(ARCHITECTURE), groups, torch.float32)
    load_weights(stage, SafetensorsWeights(directory, ARCHITECTURE))
    (directory / "model.safetensors").unlink()
    assert "weights: " in problems_of(directory)[0]
    assert not (tmp_path / "exploded").exists()
    # The bomb is a real one.
    pickle.loads((directory / name).read_bytes())
    assert (tmp_path / "exploded").exists()


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats()
    | st.sampled_from(["llama", "mistral", "linear", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "type"]), inner),
    max_leaves=4,
)


@given(
    kind=st.sampled_from(("llama", "mistral", "qwen2", "qwen3")),
    changes=st.dictionaries(
        st.sampled_from([*tiny_config("llama"), "rope_parameters", "rope_scaling", "sliding_window", "layer_types"])
        | st.sampled_from(["rms_norm_eps", "hidden_act", "partial_rotary_factor", "auto_map", "model_type"]),
        JSON_VALUES,
        max_size=3,
    ),
)
def test_any_configuration_is_accepted_or_refused_in_words(kind, changes):
    try:
        architecture = Architecture.from_hf(tiny_config(kind) | changes, "test")
    except InputError as error:
        assert {problem.key.split(".")[0] for problem in error.problems} <= {*changes, "rope_parameters", "head_dim"}
        return
    assert architecture.num_parameters == sum(torch.Size(s).numel() for s in hf_shapes(architecture).values())


def test_nested_and_long_configurations_are_refused_in_words(tmp_path):
    for content in ("[" * 100_000, "[1]", "\xff", '"x"'):
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match="config.json"):
            Architecture.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    Architecture.from_directory(tmp_path)
