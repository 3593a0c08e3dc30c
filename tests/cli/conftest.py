import json

import pytest
import tqdm
from shell_runs import MODEL, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model file, statistics and two schedules made by the command itself."""
    path = tmp_path_factory.mktemp("cli")
    (path / "my_model.py").write_text(MODEL)
    model = f"{path / 'my_model.py'}:build"
    options = ("--shape", "2,3", "--samples", "3", "--levels", "24", "-q")  # few levels, so that selecting is quick
    assert run("measure", model, *options, "-o", path / "s.safetensors").exit_code == 0
    result = run("select", path / "s.safetensors", "--steps", "4,6", "--solver", "ddim", "-o", path / "x.json")
    assert result.exit_code == 0
    return path


@pytest.fixture
def model(folder) -> str:
    return f"{folder / 'my_model.py'}:build"


@pytest.fixture
def bars(monkeypatch) -> list:
    """The progress bars that a test shows."""
    shown = []

    class Bar(tqdm.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            shown.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return shown


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A saved text-to-image pipeline of diffusers, small and random, whose tokenizer knows letters."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
    import pipelines
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("text")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    last = len(tokens) - 1
    config = CLIPTextConfig(
        **{"vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 2},
        **{"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last},
    )
    diffusers.StableDiffusionPipeline(
        vae=pipelines.small_vae(),
        text_encoder=CLIPTextModel(config),
        tokenizer=CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=16),
        unet=pipelines.small_conditional_unet(),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path / "pipeline")
    return path / "pipeline"
