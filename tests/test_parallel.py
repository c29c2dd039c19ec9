"""A model that several processes share: the whole model's numbers, errors for people, memory, a kill."""

import dataclasses
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import generate
from conftest import ROOT
from helpers import relative
from load_weights import AutoModelForCausalLM
from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM
from parallel import parallelize
from several import in_several, start

SHAPE = dict(vocab_size=96, hidden_size=48, intermediate_size=80, max_position_embeddings=64)
NEO = GPTNeoConfig(**SHAPE, num_layers=3, num_heads=4, window_size=5, attention_types=((("global", "local"), 1), (("local",), 1)),
                   bos_token_id=0, eos_token_id=0)
NEOX = GPTNeoXConfig(**SHAPE, num_hidden_layers=3, num_attention_heads=4, rotary_pct=0.5, bos_token_id=0, eos_token_id=0)
CONFIGS = {"neo": NEO, "neo-untied": dataclasses.replace(NEO, tie_word_embeddings=False), "neox": NEOX,
           "neox-sequential": dataclasses.replace(NEOX, use_parallel_residual=False, attention_bias=False),
           "neox-tied": dataclasses.replace(NEOX, tie_word_embeddings=True)}
IDS = torch.randint(1, 96, (3, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :4], MASK[2, :9] = 0, 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each kind, with wide weights."""
    folder = tmp_path_factory.mktemp("shared")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = (GPTNeoForCausalLM if config.model_type == "gpt_neo" else GPTNeoXForCausalLM)(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained(folder / name)
    return folder


def same_as_whole(folder, names, **options):
    """Logits, hidden states, greedy and sampled ids, with left padding and a cache."""
    for name in names:
        whole = AutoModelForCausalLM.from_pretrained(folder / name)
        part = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto")
        cut = parallelize(AutoModelForCausalLM.from_pretrained(folder / name))
        assert all(map(torch.equal, part.parameters(), cut.parameters()))
        assert part.num_parameters() < 0.8 * whole.num_parameters()
        with torch.no_grad():
            mine, right = (model(IDS, MASK, output_hidden_states=True) for model in (part, whole))
        for x, y in zip((*mine.hidden_states, mine.logits), (*right.hidden_states, right.logits)):
            assert relative(x, y) < 1e-6, name                     # 3e-7 measured on 2 and 4 processes
        for settings in (dict(do_sample=False), dict(do_sample=True, top_k=0, temperature=0.7)):
            written = [model.generate(IDS, MASK, max_new_tokens=20, eos_token_id=None, **settings, **how,
                                      generator=torch.Generator().manual_seed(5))
                       for model, how in ((part, options), (whole, {}))]
            assert torch.equal(*written), (name, settings)


def test_two_processes_have_the_whole_models_numbers(folder):
    in_several(same_as_whole, 2, folder, list(CONFIGS))


@pytest.mark.slow
def test_four_processes_have_the_whole_models_numbers(folder):
    in_several(same_as_whole, 4, folder, list(CONFIGS))


def on_gpus(folder):
    """The same sums by NCCL, each process on its own GPU; integers too."""
    torch.cuda.set_device(dist.get_rank())
    torch.backends.cuda.matmul.allow_tf32 = False
    ids, mask = IDS.cuda(), MASK.cuda()
    for name in CONFIGS:
        whole, part = (AutoModelForCausalLM.from_pretrained(folder / name, **how).cuda()
                       for how in ({}, dict(tp_plan="auto")))
        with torch.no_grad():
            assert relative(part(ids, mask).logits.cpu(), whole(ids, mask).logits.cpu()) < 1e-5, name
        written = [model.generate(ids, mask, max_new_tokens=20, eos_token_id=None, do_sample=False) for model in (part, whole)]
        assert torch.equal(*written), name
    part = AutoModelForCausalLM.from_pretrained(folder / "neox", weights="int8", tp_plan="auto").cuda()
    with torch.no_grad():
        assert relative(part(ids).logits.cpu(), AutoModelForCausalLM.from_pretrained(folder / "neox")(IDS).logits) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_have_the_whole_models_numbers(folder):
    in_several(on_gpus, 2, folder)


def compiled(folder, names):
    return same_as_whole(folder, names, compile=True)


@pytest.mark.slow
def test_compiled_decoding_on_two_processes(folder):
    in_several(compiled, 2, folder, ["neo", "neox"])


def quantized(folder):
    """Each process makes integers of its share: of a row that is cut, each part has a scale of its own."""
    for name in ("neo", "neox"):
        for kind, most in (("int8", 0.02), ("int4", 0.3)):         # 0.008 and 0.13 measured, the whole's errors too
            right, part = (AutoModelForCausalLM.from_pretrained(folder / name, **how)
                           for how in ({}, dict(weights=kind, tp_plan="auto")))
            with torch.no_grad():
                assert 1e-4 < relative(part(IDS).logits, right(IDS).logits) < most, (name, kind)
            for layer in (part.transformer.blocks[0].mlp.up_proj, part.transformer.blocks[0].mlp.down_proj):
                assert layer.out_features * layer.in_features == 48 * 80 / 2 and layer.kind == kind
            assert part.generate(IDS, MASK, max_new_tokens=3, eos_token_id=None).shape == (3, 23)
        with pytest.raises(ValueError, match="a quantized model cannot be cut"):
            parallelize(AutoModelForCausalLM.from_pretrained(folder / name, weights="int8"))


def test_quantized_weights(folder):
    in_several(quantized, 2, folder)
    AutoModelForCausalLM.from_pretrained(folder / "neo", weights="int4").save_pretrained(folder / "stored")
    in_several(stored, 2, folder)


def stored(folder):
    with pytest.raises(ValueError, match="is stored as int4, which cannot be shared"):
        AutoModelForCausalLM.from_pretrained(folder / "stored", tp_plan="auto")


def half_precision(folder):
    """Each process rounds its part before the sum, so the error is a little more than the whole's."""
    for name in ("neo", "neox"):
        exact = AutoModelForCausalLM.from_pretrained(folder / name, torch_dtype=torch.float64)
        for dtype in (torch.bfloat16, torch.float16):
            whole = AutoModelForCausalLM.from_pretrained(folder / name, torch_dtype=dtype)
            part = AutoModelForCausalLM.from_pretrained(folder / name, torch_dtype=dtype, tp_plan="auto")
            with torch.no_grad():
                right, *errors = (model(IDS).logits for model in (exact, whole, part))
            base, mine = (relative(logits, right) for logits in errors)
            assert mine < 2 * base, (name, dtype, mine, base)


def test_half_precision(folder):
    in_several(half_precision, 2, folder)


def collectives(folder):
    """One all-reduce a layer where attention and MLP are parallel, else two; one gather of an untied head."""
    for name in CONFIGS:
        model = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto")
        counts = {"all_reduce": 0, "all_gather": 0}
        with pytest.MonkeyPatch.context() as patch:
            for kind in counts:
                def counted(*args, kind=kind, call=getattr(dist, kind)):
                    counts[kind] += 1
                    return call(*args)
                patch.setattr(dist, kind, counted)
            model(IDS)
        one = getattr(model.transformer.blocks[0], "parallel", False)
        assert counts["all_reduce"] == model.config.num_hidden_layers * (1 if one else 2), name
        assert counts["all_gather"] == 1 + (not model.config.tie_word_embeddings), name    # 1: the same ids?


def test_number_of_collectives(folder):
    in_several(collectives, 2, folder)


def refusals(folder, N):
    model = AutoModelForCausalLM.from_pretrained(folder / "neox", tp_plan="auto")
    with pytest.raises(RuntimeError, match="different ids"):
        model(torch.full((1, 4), dist.get_rank()))
    with pytest.raises(RuntimeError, match="different ids"):
        model(IDS if dist.get_rank() else IDS.flip(1))
    with pytest.raises(ValueError, match="output_attentions"):
        model(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="has only a part of the weights"):
        model.save_pretrained(folder / "never")
    with pytest.raises(ValueError, match="already shared"):
        parallelize(model)
    assert not (folder / "never").exists() and not any(p.requires_grad for p in model.parameters())
    for changes, words in ((dict(num_attention_heads=3), "3 attention heads"), (dict(vocab_size=95), "vocabulary"),
                           (dict(intermediate_size=81), "inner width")):
        odd = GPTNeoXForCausalLM(dataclasses.replace(NEOX, **changes))
        with pytest.raises(ValueError, match=f"{words}.* cannot be shared among {N} processes"):
            parallelize(odd)


def test_what_cannot_be_shared_is_refused(folder):
    in_several(refusals, 2, folder, 2)


def test_without_other_processes(folder):
    with pytest.raises(RuntimeError, match="none are connected: start Python by torchrun"):
        AutoModelForCausalLM.from_pretrained(folder / "neo", tp_plan="auto")
    with pytest.raises(ValueError, match="tp_plan='colwise' is not supported"):
        AutoModelForCausalLM.from_pretrained(folder / "neo", tp_plan="colwise")


def command(*arguments):
    return generate.main(list(arguments))


DEMO = ("HAMLET.", "--model", str(ROOT / "checkpoints" / "demo-neox"))


def finished(processes, seconds):
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def test_the_command_writes_once(capsys):
    made, folder = start(command, 2, *DEMO, "--seed", "4", "--max-new-tokens", "20", connect=False)
    assert finished(made, 60) == [0, 0], (folder / "err").read_text()
    assert generate.main([*DEMO, "--seed", "4", "--max-new-tokens", "20"]) == 0
    assert (folder / "out").read_text() == capsys.readouterr().out
    assert (folder / "err").read_text().count("demo-neox") == 1


@pytest.mark.parametrize("more, words", [
    (["--model", "no/such/folder/here"], "no/such/folder/here"),
    (["--interactive"], "standard input cannot be shared"),
    (["--max-new-tokens", "0"], "max_new_tokens")])
def test_an_error_is_said_once(more, words):
    made, folder = start(command, 2, *DEMO, *more, connect=False)
    assert finished(made, 60) == [2, 2]
    errors = [line for line in (folder / "err").read_text().splitlines() if "error:" in line]
    assert len(errors) == 1 and words in errors[0] and (folder / "out").read_text() == ""


def test_a_killed_process_ends_the_others():
    made, folder = start(command, 2, *DEMO, "--max-new-tokens", "1500", "--greedy", connect=False)
    while len((folder / "out").read_text() if (folder / "out").exists() else "") < 40:
        assert made[0].is_alive()
        time.sleep(0.05)
    os.kill(made[1].pid, signal.SIGKILL)
    assert finished(made, 10) == [2, -signal.SIGKILL]
    errors = [line for line in (folder / "err").read_text().splitlines() if "error:" in line]
    assert errors == ["error: another of the processes that share the model has ended"]


def peak(folder):
    """Loading holds little more than what the process keeps."""
    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    before = status("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    kept = sum(p.nbytes for p in model.parameters())
    assert kept < 0.65 * model.config.num_hidden_layers * 12 * model.config.hidden_size ** 2 * 4 + 2 * 96 * 4 * 2048
    most = status("VmHWM") - before                                # beyond its share about 30 MB
    assert most < 1.1 * kept, (most / 2**20, kept / 2**20, before / 2**20, status("RssFile") / 2**20)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("family", ["neo", "neox"])
def test_peak_memory_is_a_processs_share(family, tmp_path):
    shape = dict(vocab_size=96, hidden_size=1024, max_position_embeddings=64, intermediate_size=4096)
    model = (GPTNeoForCausalLM(GPTNeoConfig(**shape, num_layers=24, num_heads=8, attention_types=((("global", "local"), 12),)))
             if family == "neo" else GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_hidden_layers=24, num_attention_heads=8)))
    model.save_pretrained(tmp_path)
    del model
    in_several(peak, 2, tmp_path)
