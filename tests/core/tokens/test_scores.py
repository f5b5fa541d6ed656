"""Scores in a folder: found again by a document's tokens, in any collator; what is not there is an error."""

import pickle
import resource

import numpy as np
import pytest
from collators import FirstTokenMasked, FlatteningCollator, PaddingCollator
from support import documents

from wit_plugins import WeightsNotAppliedError, WITConfigError, hookimpl, reference_in
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.contract.requirements import without_references
from wit_plugins.testing import registered
from wit_plugins.tokens.codes import decode, locate
from wit_plugins.tokens.collator import CODES_KEY, SCORES_KEY, WeightedCollator
from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.tokens.reference_scores import Scores, ScoresWriter, scored_documents


class Compares:
    @hookimpl
    @reference_in("against")
    def dynamic_weights(self, reference_log_probs):
        return -reference_log_probs


@pytest.fixture(scope="module", autouse=True)
def _compares():
    with registered(Compares(), "compares"), registered(Compares(), "compares too"):
        yield


def said_of(ids, position):
    """A number for a token that only its document and its place decide, not of few bits."""
    return -np.float32(1 + sum((i + 1) * 31**k % 1009 for k, i in enumerate(ids)) / 997 + position / 7)


def write(folder, docs, shards=2):
    writer = ScoresWriter(folder, {"model": "m", "dataset": "d"})
    read = [next(scored_documents(ExampleReader()(doc.example()))) for doc in docs]
    for part in range(shards):
        mine = read[part::shards]
        log_probs = [
            np.array([said_of(d.input_ids.tolist(), t) for t in range(1, len(d.input_ids))], dtype=np.float32)
            for d in mine
        ]
        writer.add([d.fingerprint for d in mine], log_probs)
    writer.finish()


def packed(docs):
    """Rows of three documents, one behind the other."""
    rows = []
    for at in range(0, len(docs), 3):
        own = docs[at : at + 3]
        ids, labels = [i for doc in own for i in doc.input_ids], [i for doc in own for i in doc.labels]
        rows.append({"input_ids": ids, "labels": labels, "seq_lengths": [len(doc.input_ids) for doc in own]})
    return rows


def strategies(folder, **more):
    options = {"wit": {"prompt_weight": 0.5, "response_weight": 1.0}, "compares": {"against": str(folder)}, **more}
    return ActiveStrategies(options)


COLLATORS = {
    "padded": (PaddingCollator(), False),
    "left": (PaddingCollator(left=True), False),
    "flattened": (FlatteningCollator(), False),
    "first labels taken out": (FirstTokenMasked(), False),
    "packed": (PaddingCollator(8), True),
}


@pytest.mark.parametrize(("collator", "is_packed"), COLLATORS.values(), ids=COLLATORS)
def test_each_token_has_its_own_bit_for_bit(tmp_path, collator, is_packed):
    """By its document and position, after pickling as for a worker; the folder has more documents than the batch."""
    docs = documents(24, seed=3)
    write(tmp_path, docs)
    mine = docs[5:16]
    examples = packed(mine) if is_packed else [doc.example() for doc in mine]
    weighted = pickle.loads(pickle.dumps(WeightedCollator(collator, strategies(tmp_path))))
    batch = weighted(examples)
    codes, bits = batch[CODES_KEY], batch[SCORES_KEY]
    real = decode(codes)[1] != 0
    found = bits.numpy().astype(np.int32).view(np.float32)
    document, position = (x.numpy() for x in locate(codes))
    count = 0
    for row, column in real.nonzero().tolist():
        ids = mine[document[row, column]].input_ids
        assert found[row, column] == said_of(ids, position[row, column])
        count += 1
    assert count == sum(len(doc.input_ids) - 1 for doc in mine)


def test_two_documents_that_begin_alike_are_two(tmp_path):
    docs = documents(6, seed=1, low=6)
    docs[1].input_ids[:4] = docs[0].input_ids[:4]
    write(tmp_path, docs, shards=1)
    cut = {name: column[:-1] for name, column in docs[0].example().items()}
    weighted = WeightedCollator(PaddingCollator(), strategies(tmp_path))
    weighted([docs[0].example(), docs[1].example()])
    with pytest.raises(
        WITConfigError, match=r"example 1 of a batch of 2: there are no scores of this document.*wit sc"
    ):
        weighted([docs[0].example(), cut])


def test_the_first_bytes_of_two_fingerprints_may_be_equal(tmp_path):
    """The index is searched by eight bytes, and compared by sixteen."""
    read = [next(scored_documents(ExampleReader()(doc.example()))) for doc in documents(3, low=5)]
    names = [d.fingerprint for d in read]
    alike = [names[1][:8] + other * 8 for other in (b"\x00", b"\xff")]
    writer = ScoresWriter(tmp_path, {"model": "m"})
    writer.add(
        [alike[0], names[1], alike[1]],
        [np.zeros(2, np.float32), np.full(len(read[1].targets), -3, np.float32), np.zeros(2, np.float32)],
    )
    writer.finish()
    assert Scores(str(tmp_path))(read[1]).tolist() == [0] + [-3] * len(read[1].targets)
    with pytest.raises(WITConfigError, match="no scores of this document"):
        Scores(str(tmp_path))(read[0])


def test_what_is_hidden_in_the_middle_is_refused(tmp_path):
    docs = documents(2, low=8)
    write(tmp_path, docs)
    mask = [1] * len(docs[0].input_ids)
    mask[3] = 0
    labels = [-100] * len(mask)
    with pytest.raises(WITConfigError, match="attention_mask is 0 in the middle"):
        WeightedCollator(PaddingCollator(), strategies(tmp_path))(
            [{"input_ids": docs[0].input_ids, "labels": labels, "attention_mask": mask}]
        )


def test_padding_of_the_example_itself_is_no_token(tmp_path):
    docs = documents(2, low=8)
    write(tmp_path, docs)
    doc, padding = docs[0], 3
    padded = {
        "input_ids": [0] * padding + doc.input_ids + [0],
        "labels": [-100] * padding + doc.labels + [-100],
        "attention_mask": [0] * padding + [1] * len(doc.input_ids) + [0],
    }
    found = WeightedCollator(PaddingCollator(), strategies(tmp_path)).log_probs(padded)
    expected = [said_of(doc.input_ids, t) for t in range(1, len(doc.input_ids))]
    assert found.tolist() == [0] * (padding + 1) + expected + [0]


class Reversing(PaddingCollator):
    def __call__(self, features):
        return super().__call__(features[::-1])


def test_another_order_stops(tmp_path):
    docs = documents(4)
    write(tmp_path, docs)
    with pytest.raises(WeightsNotAppliedError, match="another order, so the scores"):
        WeightedCollator(Reversing(), strategies(tmp_path))([doc.example() for doc in docs])


def test_a_folder_that_cannot_be_used(tmp_path):
    scores = Scores(str(tmp_path / "none"))
    with pytest.raises(WITConfigError, match=r"holds no scores.*make them with `wit score CONFIG --output"):
        scores.open()
    docs = documents(4, low=6)
    writer = ScoresWriter(tmp_path / "some", {"model": "m"})
    writer.add([b"0" * 16], [np.zeros(3, np.float32)])
    with pytest.raises(WITConfigError, match="are not complete.*goes on where it stopped"):
        Scores(str(tmp_path / "some")).open()
    write(tmp_path / "cut", docs, shards=1)
    path = tmp_path / "cut" / "00000.log_probs.npy"
    path.write_bytes(path.read_bytes()[:-4])
    cut = WeightedCollator(PaddingCollator(), strategies(tmp_path / "cut"))
    with pytest.raises(WITConfigError, match="damaged"):
        cut([doc.example() for doc in docs])


def test_one_reference_a_run(tmp_path):
    assert strategies("a", **{"compares too": {"against": "a"}}).needs.reference == "a"
    for other in ({"against": "b"}, {}):
        with pytest.raises(WITConfigError, match="compares with one reference, not with several.*compares too = "):
            strategies("a", **{"compares too": other})
    with pytest.raises(WITConfigError, match=r"compares: against = 3: is the name of a folder"):
        strategies("a", compares={"against": 3})
    with without_references():
        assert strategies("a").needs.reference is None
        assert strategies("a").needs.references == ()
    assert strategies("a").needs.references == ("compares",)


def test_a_folder_of_something_else_is_not_written_to(tmp_path):
    write(tmp_path / "scores", documents(3))
    with pytest.raises(WITConfigError, match="holds scores of another model \\(m, not n\\); name another --output"):
        ScoresWriter(tmp_path / "scores", {"model": "n", "dataset": "d"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(WITConfigError, match="holds other files, and no scores"):
        ScoresWriter(tmp_path / "mine", {"model": "n"})


def test_a_full_disk_is_a_line_and_what_was_complete_stays(tmp_path):
    """A file may be no longer than 100 bytes, to the operating system."""
    writer = ScoresWriter(tmp_path, {"model": "m"})
    writer.add([b"0" * 16], [np.zeros(3, np.float32)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(WITConfigError, match=r"00001.log_probs.npy: cannot be written .*start again"):
            writer.add([b"1" * 16], [np.ones(3, np.float32)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ScoresWriter(tmp_path, {"model": "m"}).written == {b"0" * 16}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_shard_that_was_being_written_is_none(tmp_path):
    """Killed between its two files, or within one: the documents are to be scored again."""
    writer = ScoresWriter(tmp_path, {"model": "m"})
    writer.add([b"0" * 16], [np.zeros(3, np.float32)])
    writer.add([b"1" * 16], [np.ones(3, np.float32)])
    (tmp_path / "00001.documents.npy").unlink()
    (tmp_path / ".00001.documents.npy.77").write_bytes(b"\x93NUM")
    again = ScoresWriter(tmp_path, {"model": "m"})
    assert again.written == {b"0" * 16}
    again.add([b"2" * 16], [np.full(2, -2, np.float32)])
    assert np.load(tmp_path / "00001.log_probs.npy").tolist() == [-2, -2]
    assert ScoresWriter(tmp_path, {"model": "m"}).written == {b"0" * 16, b"2" * 16}
