"""`wit score`: each document's log-probabilities, by any model; killed anywhere it goes on; wrong folders stop."""

import fcntl
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from clikit import read_json, wit, workplace
from datasets import Dataset
from literature import adapted
from support import from_dataset, llama, subprocess_env
from transformers import AutoModelForCausalLM
from trlkit import dataset, tokenizer
from wit_trl.driver import TRLDriver

from wit_plugins.cli.driver import Job
from wit_plugins.errors import WITConfigError
from wit_plugins.loss.document_scores import DocumentScorer
from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.tokens.reference_scores import Scores, scored_documents


def other_model(folder, **changes):
    path = folder / "reference"
    llama(seed=7, **{"vocab_size": 64, **changes}).save_pretrained(path)
    return path


def documents_of(path, split="train"):
    """As the framework makes them, read off its dataset."""
    return from_dataset(TRLDriver().prepare(Job(path, yaml.safe_load(path.read_text()))).splits[split].rows)


def said(model, ids):
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def check_scores(folder, model, docs):
    """Against a plain forward of each document on its own, in float64."""
    scores, model = Scores(str(folder)), model.double().eval()
    for doc in docs:
        (document,) = scored_documents(ExampleReader()(doc.example()))
        found = scores(document)
        assert found.dtype == np.float32
        assert found[0] == 0
        assert found[1:] == pytest.approx(said(model, doc.input_ids), rel=1e-5, abs=1e-5)


SHAPES = {
    "unpacked": {},
    "packed": {"packing": True, "max_length": 24},
    "cut into rows": {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "a stream": {"dataset_streaming": True, "max_steps": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_each_document_alone(tmp_path, capsys, shape):
    path = workplace(tmp_path, **SHAPES[shape])
    reference = other_model(tmp_path)
    args = ("score", path, "--model", reference, "--output", tmp_path / "scores", "--batch-size", 3)
    code, out, _ = wit(*args, capsys=capsys)
    docs = documents_of(path)
    check_scores(tmp_path / "scores", llama(seed=7, vocab_size=64), docs)
    distinct = len({tuple(doc.input_ids) for doc in docs})
    assert (code, f"{distinct} documents" in out) == (0, True)
    about = read_json(tmp_path / "scores" / "scores.json")
    assert about["documents"] == distinct
    assert about["model"] == str(reference)
    assert about["tokenizer"] == str(tmp_path / "model")


def test_the_configuration_s_own_model_and_all_its_datasets(tmp_path, capsys):
    """Before there are scores, in a configuration that already names them; afterwards training may start."""
    strategies = {"rho1": {"share": 0.5, "reference": str(tmp_path / "scores")}}
    path = workplace(tmp_path, evaluation=True, eval_strategy="epoch", strategies=strategies)
    train = tmp_path / "data" / "test.jsonl"
    dataset("conversational", 5, seed=3).to_json(str(train))
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert "holds no scores" in " ".join(out.split())
    assert wit("score", path, "--output", tmp_path / "scores", capsys=capsys)[0] == 0
    docs = documents_of(path) + documents_of(path, "eval")
    check_scores(tmp_path / "scores", llama(vocab_size=64), docs)
    assert read_json(tmp_path / "scores" / "scores.json")["documents"] == 13
    assert wit("check", path, capsys=capsys)[0] == 0


def test_check_looks_every_document_up(tmp_path, capsys, monkeypatch):
    """Of which training looks at some before it starts; here at the first and the last."""
    folder = tmp_path / "scores"
    path = workplace(tmp_path, strategies={"rho1": {"share": 0.5, "reference": str(folder)}})
    assert wit("score", path, "--output", folder, capsys=capsys)[0] == 0
    monkeypatch.setattr("wit_plugins.data_weights.columns.READ_AT_MOST", 2)
    assert wit("check", path, capsys=capsys)[0] == 0
    ids = documents_of(path)[3].input_ids
    index = np.load(folder / "documents.npy")
    (document,) = scored_documents(ExampleReader()({"input_ids": ids, "labels": ids}))
    high = int.from_bytes(document.fingerprint[:8], "little")
    np.save(folder / "documents.npy", index[index["high"] != np.uint64(high)])
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert "dataset train, row 3 (from 0): there are no scores of this document" in " ".join(out.split())


def test_a_document_that_comes_twice_is_scored_once(tmp_path, capsys):
    rows = dataset("conversational", 4).to_list()
    path = workplace(tmp_path, Dataset.from_list(rows * 3))
    assert "4 documents" in wit("score", path, "--output", tmp_path / "scores", capsys=capsys)[1]
    assert len(np.load(tmp_path / "scores" / "documents.npy")) == 4


@pytest.mark.parametrize("how", ["softcap", "logits that nobody knows"])
def test_models_whose_head_is_special(tmp_path, capsys, how, monkeypatch):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    path = workplace(tmp_path)
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=64, **sizes, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5,
        query_pre_attn_scalar=8, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path / "gemma")
    if how.startswith("logits"):
        monkeypatch.setattr("wit_plugins.loss.fused._close", lambda *_: False)
    args = ("score", path, "--model", tmp_path / "gemma", "--output", tmp_path / "scores")
    code, _, err = wit(*args, capsys=capsys)
    assert code == 0, err
    check_scores(tmp_path / "scores", model, documents_of(path))


KILLED = """
import os, signal, sys
import wit_plugins.cli.score as score
import wit_plugins.tokens.reference_scores as scores
from wit_plugins.cli import main
score._SHARD, write, written = 2, scores._write, []
def die_at(path, array):
    if path.name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, array)
scores._write = die_at
main(sys.argv[2:])
"""


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("at", ["00001.log_probs.npy", "00002.documents.npy", "documents.npy"])
def test_killed_it_goes_on(tmp_path, capsys, monkeypatch, at):
    """Before a shard, within one and at the very end: nothing is done twice, and nothing is missing."""
    path = workplace(tmp_path)
    output = tmp_path / "scores"
    command = [sys.executable, "-c", KILLED, at, "score", str(path), "--output", str(output)]
    killed = subprocess.run(command, env=subprocess_env(), cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    before = files(output)
    complete = {"00001.log_probs.npy": 1, "00002.documents.npy": 2, "documents.npy": 4}[at]
    assert sum(bool(re.fullmatch(r"\d+\.documents\.npy", name)) for name in before) == complete
    with pytest.raises(WITConfigError, match="not complete"):
        Scores(str(output)).open()

    scored = []
    monkeypatch.setattr("wit_plugins.cli.score._SHARD", 2)
    own = DocumentScorer.__call__
    monkeypatch.setattr(DocumentScorer, "__call__", lambda self, docs: scored.extend(docs) or own(self, docs))
    code, out, _ = wit("score", path, "--output", output, capsys=capsys)
    assert (code, len(scored)) == (0, 8 - 2 * complete)
    assert f"8 documents ({2 * complete} of them were there)" in out
    check_scores(output, llama(vocab_size=64), documents_of(path))
    kept = {name: data for name, data in before.items() if name[:5].isdigit() and int(name[:5]) < complete}
    assert kept.items() <= files(output).items()
    assert wit("score", path, "--output", output, capsys=capsys)[0] == 0
    assert len(scored) == 8 - 2 * complete  # and no more


def test_another_model_s_or_another_dataset_s_folder_is_refused(tmp_path, capsys):
    path, output = workplace(tmp_path), tmp_path / "scores"
    assert wit("score", path, "--output", output, capsys=capsys)[0] == 0
    before = files(output)

    def refused(*args):
        code, _, err = wit("score", path, "--output", output, *args, capsys=capsys)
        assert (code, files(output) == before) == (2, True)
        return err

    reference = other_model(tmp_path)
    assert re.search(
        r"holds scores of another model \(.*model, not .*reference\); name another --ou", refused("--model", reference)
    )
    assert "scores of another dataset" in refused("--set", "max_length=8")
    llama(seed=3, vocab_size=64).save_pretrained(tmp_path / "model")
    assert "another version of the model" in refused()


def test_one_at_a_time(tmp_path, capsys):
    path, output = workplace(tmp_path), tmp_path / "scores"
    output.mkdir()
    with open(output / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = wit("score", path, "--output", output, capsys=capsys)
    assert code == 2
    assert "another `wit score` is running there" in err
    assert wit("score", path, "--output", output, capsys=capsys)[0] == 0


def test_a_model_with_an_adapter(tmp_path, capsys):
    """A folder that holds an adapter alone is read with the model that it was made for."""
    path = workplace(tmp_path)
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    model.save_pretrained(tmp_path / "adapter")
    args = ("score", path, "--model", tmp_path / "adapter", "--output", tmp_path / "scores")
    code, _, err = wit(*args, capsys=capsys)
    assert code == 0, err
    check_scores(tmp_path / "scores", model, documents_of(path))


def test_a_model_that_cannot_be_the_reference(tmp_path, capsys):
    path = workplace(tmp_path)

    def refused(model):
        code, _, err = wit("score", path, "--output", tmp_path / "scores", "--model", model, capsys=capsys)
        assert code == 2
        assert not (tmp_path / "scores" / "documents.npy").exists()
        return err

    assert "has the token id" in refused(other_model(tmp_path, vocab_size=20))
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refused(tmp_path / "empty")
    exchanged = tokenizer()
    one, two = sorted(exchanged.get_vocab(), key=exchanged.get_vocab().get)[10:12]
    text = exchanged.backend_tokenizer.to_str().replace(f'"{one}":10', '"?":11').replace(f'"{two}":11', f'"{one}":11')
    exchanged = type(exchanged)(
        tokenizer_object=type(exchanged.backend_tokenizer).from_str(text.replace('"?":11', f'"{two}":10'))
    )
    llama(vocab_size=64).save_pretrained(tmp_path / "exchanged")
    exchanged.save_pretrained(tmp_path / "exchanged")
    assert "its tokenizer is another one" in refused(tmp_path / "exchanged")


def test_a_configuration_that_training_refuses_is_not_scored(tmp_path, capsys):
    path = workplace(tmp_path, label_smoothing_factor=0.1)
    code, _, err = wit("score", path, "--output", tmp_path / "scores", capsys=capsys)
    assert code == 2
    assert "training would refuse to start" in err
    assert not (tmp_path / "scores").exists()
