"""What a user does with an exported folder, in a process that cannot import this package.

    python -I tests/remote_code/user.py FOLDER [PATH ...]      prints the names of the checks that held

Each PATH is put before the installed packages: of another release of transformers, of peft and accelerate.
"""

import importlib.abc
import importlib.util
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable

FOLDER, *PATHS = sys.argv[1:]
sys.path[:0] = PATHS


class Blocked(importlib.abc.MetaPathFinder):
    """No module of this package is found."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "swamla_titan":
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocked())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

TEXTS = ["The cat", "A", "Some longer text than the others, which goes beyond the window"]
NEW = {"max_new_tokens": 30, "do_sample": False}
REMOTE = {"trust_remote_code": True}

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, **REMOTE)
batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def load(**options):
    return AutoModelForCausalLM.from_pretrained(FOLDER, **REMOTE, **options).eval()


model = load()
CACHE = "cache" if hasattr(model(batch["input_ids"]), "cache") else "past_key_values"


def new_tokens(**options) -> list[list[int]]:
    return model.generate(**batch, **NEW, **options)[:, batch["input_ids"].shape[1] :].tolist()


def logits_are_those_of_the_model():
    """The folder beside has tokens and the logits that the package computed of them."""
    tokens, logits = torch.load(os.path.join(os.path.dirname(FOLDER), "expected.pt"))
    with torch.no_grad():
        cache = DynamicCache()
        parts = [model(part, **{CACHE: cache}).logits for part in tokens.split([20, 20, *[1] * 20], dim=1)]
        assert (model(tokens).logits - logits).abs().max() < 1e-5
        assert (torch.cat(parts, dim=1) - logits).abs().max() < 1e-5


def special_tokens_within_a_text_are_text():
    for name in (tokenizer.eos_token, tokenizer.pad_token):
        ids = tokenizer(f"a{name}")["input_ids"]
        assert ids == [*f"a{name}".encode()]
        assert tokenizer.decode(ids) == f"a{name}"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def a_batch_gives_what_its_texts_give_alone():
    end = model.generation_config.eos_token_id
    together = new_tokens()
    for text, continuation in zip(TEXTS, together):
        inputs = tokenizer(text, return_tensors="pt")
        alone = model.generate(**inputs, **NEW)[0, inputs["input_ids"].shape[1] :].tolist()
        length = continuation.index(end) if end in continuation else len(continuation)
        assert alone[:length] == continuation[:length]


def all_caches_give_the_same():
    expected = new_tokens(use_cache=False)
    assert new_tokens() == new_tokens(cache_implementation="static") == expected
    assert new_tokens(cache_implementation="dynamic", prefill_chunk_size=4) == expected


def static_decoding_compiles_as_one_graph():
    options = transformers.CompileConfig(fullgraph=True, backend="eager", mode="default")
    options._compile_all_devices = True
    assert new_tokens(cache_implementation="static", compile_config=options) == new_tokens()


def beams():
    expected = new_tokens(num_beams=3, use_cache=False)
    assert new_tokens(num_beams=3) == new_tokens(num_beams=3, cache_implementation="static") == expected
    options = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2, "max_new_tokens": 4}
    found = model.generate(**batch, do_sample=False, **options)
    scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    assert scores.shape == (3, 4)


def a_dialogue_continues_from_its_cache():
    cache = DynamicCache(config=model.config)
    ids = tokenizer(TEXTS[2], return_tensors="pt")["input_ids"]
    found = model.generate(ids, **NEW, **{CACHE: cache}, return_dict_in_generate=True)
    more = torch.cat([found.sequences, tokenizer(" and", return_tensors="pt")["input_ids"]], dim=1)
    assert torch.equal(model.generate(more, **NEW, **{CACHE: found[CACHE]}), model.generate(more, **NEW))


def what_the_cache_cannot_do_is_refused():
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    try:
        model.generate(ids, **NEW, prompt_lookup_num_tokens=3)
    except (ValueError, NotImplementedError) as error:
        assert "crop" in str(error)  # noqa: PT017
    else:
        raise AssertionError("drafted tokens were taken back")


def saved_and_loaded_again_it_is_the_same():
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with open(f"{folder}/config.json") as config:
            assert json.load(config)["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        again = AutoModelForCausalLM.from_pretrained(folder, **REMOTE).eval()
        for (name, tensor), (other, stored) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(tensor, stored)
        assert AutoTokenizer.from_pretrained(folder, **REMOTE)(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def other_classes():
    base = AutoModel.from_pretrained(FOLDER, **REMOTE).eval()
    hidden = base(batch["input_ids"]).last_hidden_state
    assert torch.equal(model.lm_head(hidden)[..., : model.config.vocab_size], model(batch["input_ids"]).logits)
    drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER, **REMOTE), **REMOTE)
    assert abs(drawn.model.embedding.weight.std().item() - 0.02) < 0.002
    assert {each.dtype for each in load(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def devices():
    auto = load(device_map="auto")
    expected = model(batch["input_ids"]).logits
    assert torch.allclose(auto(batch["input_ids"]).logits, expected, atol=1e-6)
    names = [f"model.{name}" for name, _ in model.model.named_children() if name != "blocks"] + ["lm_head"]
    places = dict.fromkeys(names, "cpu") | {
        f"model.blocks.{layer}": "disk" if layer else "cpu" for layer in range(len(model.model.blocks))
    }
    with tempfile.TemporaryDirectory() as folder:
        offloaded = load(device_map=places, offload_folder=folder)
        assert torch.allclose(offloaded(batch["input_ids"]).logits, expected, atol=1e-6)
        assert torch.equal(offloaded.generate(**batch, **NEW), model.generate(**batch, **NEW))


def gradient_checkpointing_changes_no_gradient():
    def gradients() -> list[torch.Tensor]:
        trained.zero_grad()
        trained(**batch, labels=labels).loss.backward()
        return [each.grad.clone() for each in trained.parameters()]

    trained = load().train()
    for block in trained.model.blocks:
        block.dropout = 0.0
    expected = gradients()
    assert all(each.abs().sum() > 0 for each in expected)
    for is_reentrant in (False, True):
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": is_reentrant})
        trained.enable_input_require_grads()
        for found, wanted in zip(gradients(), expected):
            assert torch.allclose(found, wanted, atol=1e-6)


def new_tokens_can_be_added():
    resized = load()
    if model.config.engram:
        return
    resized.resize_token_embeddings(model.config.vocab_size + 3)
    assert resized(batch["input_ids"]).logits.shape[-1] == model.config.vocab_size + 3
    with tempfile.TemporaryDirectory() as folder:
        resized.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, **REMOTE).eval()
        assert torch.equal(again(batch["input_ids"]).logits, resized(batch["input_ids"]).logits)


def adapters_reach_every_layer_and_decoding():
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(load(), options).eval()
    ids = batch["input_ids"][2:]
    found = adapted.generate(input_ids=ids, **NEW)
    assert torch.equal(found, adapted.generate(input_ids=ids, **NEW, use_cache=False))
    assert not torch.equal(adapted(input_ids=ids).logits, model(ids).logits)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(each.grad.abs().sum() > 0 for each in adapted.parameters() if each.requires_grad)
    assert torch.equal(adapted.merge_and_unload().generate(input_ids=ids, **NEW), found)


NEEDS = {adapters_reach_every_layer_and_decoding: "peft", devices: "accelerate"}


def checks() -> list[Callable[[], None]]:
    own = [each for each in globals().values() if inspect.isfunction(each) and not inspect.signature(each).parameters]
    checks = [each for each in own if each.__module__ == __name__ and each is not globals()["checks"]]
    return [each for each in checks if importlib.util.find_spec(NEEDS.get(each, "torch"))]


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    for check in checks():
        check()
        print(check.__name__, flush=True)
    assert "swamla_titan" not in sys.modules
    print(f"transformers {transformers.__version__}")
