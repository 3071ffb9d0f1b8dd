import json
import random

import pytest
import torch
from datasets import Dataset

from maca_llmc.common.errors import UserError
from maca_llmc.common.tokens import special_tokens
from maca_llmc.data import build_calibration_set
from maca_llmc.data.calibration import check_ids

BOS = 1  # its id in conftest's vocabulary


def words(start, count):
    return " ".join(f"w{number}" for number in range(start, start + count))


def chat(*contents):
    roles = ["user", "assistant"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def tokens_of(calibration):
    return [token for sequence in calibration.sequences for token in sequence.tolist()]


class TestWindows:
    def test_exact_lengths_and_counts(self, plain, documents):
        built = build_calibration_set(plain, source=documents, scales=(4, 8, 16), tokens=144)
        assert sorted(built.lengths) == [4] * 12 + [8] * 6 + [16] * 3
        assert all(s.dtype == torch.long and s.ndim == 1 for s in built.sequences)

    def test_equal_counts(self, plain, documents):
        built = build_calibration_set(
            plain, source=documents, scales=(4, 8, 16), tokens=144, balance="counts"
        )
        assert sorted(built.lengths) == [4] * 5 + [8] * 5 + [16] * 5

    def test_no_token_twice(self, plain, documents):
        tokens = tokens_of(
            build_calibration_set(plain, source=documents, scales=(4, 8, 16), tokens=300)
        )
        assert len(tokens) == len(set(tokens)) > 290

    def test_lengths_are_mixed(self, plain, documents):
        built = build_calibration_set(plain, source=documents, scales=(4, 16), tokens=256)
        assert built.lengths not in (sorted(built.lengths), sorted(built.lengths, reverse=True))

    def test_fixed_length(self, plain, documents):
        built = build_calibration_set(plain, source=documents, scales=(10,), tokens=100)
        assert built.lengths == [10] * 10
        # ten windows, ten documents: one from each
        assert len({(sequence[0].item() - 6) // 40 for sequence in built.sequences}) == 10

    def test_reads_only_what_it_needs(self, plain, monkeypatch):
        read = []

        class Counting(list):
            def __getitem__(self, index):
                read.append(index)
                return super().__getitem__(index)

        data = Counting(words(n % 300, 20) for n in range(1000))
        monkeypatch.setattr("maca_llmc.data.calibration.read_documents", lambda *a, **k: data)
        build_calibration_set(plain, source=[], scales=(10,), tokens=100)
        assert len(read) == 10

    def test_the_shipped_sample_is_the_default(self, plain):
        record = build_calibration_set(plain).record()
        assert record["lengths"] == {"128": 102, "256": 51, "512": 26, "1024": 13, "2048": 6}
        assert "sample" in record["source"]


class TestWholeDocuments:
    def test_natural_lengths_cut_at_the_last_scale(self, plain):
        source = [words(0, 5), words(10, 30), words(50, 12)]
        built = build_calibration_set(
            plain, source=source, scales=(4, 16), tokens=33, whole_documents=True
        )
        assert sorted(built.lengths) == [5, 12, 16]
        assert built.record()["lengths"] == {"5-8": 1, "9-16": 2}

    def test_without_scales_cut_at_the_context(self, plain):
        source = [words(0, 5), words(10, 30), words(50, 12)]
        kwargs = {"source": source, "scales": None, "whole_documents": True}
        cut = build_calibration_set(plain, tokens=37, max_context=20, **kwargs)
        assert sorted(cut.lengths) == [5, 12, 20]
        uncut = build_calibration_set(plain, tokens=47, **kwargs)
        assert sorted(uncut.lengths) == [5, 12, 30]
        assert uncut.record()["scales"] is None

    def test_never_exceeds_the_budget(self, plain, documents):
        built = build_calibration_set(
            plain, source=documents, scales=(64,), tokens=100, whole_documents=True
        )
        assert built.lengths == [40, 40]


class TestDeterminism:
    def test_two_builds_agree(self, plain, documents):
        kwargs = {"source": documents, "scales": (4, 8), "tokens": 100, "seed": 3}
        first = build_calibration_set(plain, **kwargs)
        second = build_calibration_set(plain, **kwargs)
        assert first.record() == second.record()
        assert all(map(torch.equal, first.sequences, second.sequences))

    def test_seed_changes_the_sequences(self, plain, documents):
        records = [
            build_calibration_set(
                plain, source=documents, scales=(4, 8), tokens=100, seed=seed
            ).record()
            for seed in (0, 1)
        ]
        assert records[0]["sha256"] != records[1]["sha256"]
        assert records[0]["lengths"] == records[1]["lengths"]

    def test_global_generators_are_neither_used_nor_moved(self, plain, documents):
        def build():
            built = build_calibration_set(plain, source=documents, scales=(4, 8), tokens=100)
            list(built.dataloader())
            return built.record()["sha256"]

        random.seed(1)
        torch.manual_seed(1)
        before = random.getstate(), torch.get_rng_state()
        first = build()
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        random.seed(2)
        torch.manual_seed(2)
        assert build() == first

    def test_the_form_of_the_source_makes_no_difference(self, plain, documents, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        data = Dataset.from_dict({"text": documents})
        data.save_to_disk(tmp_path / "saved")
        hashes = {
            build_calibration_set(plain, source=source, scales=(4, 8), tokens=100).record()[
                "sha256"
            ]
            for source in (documents, data, path, tmp_path / "saved")
        }
        assert len(hashes) == 1


class TestSpecialTokens:
    def test_prefix(self, plain, with_bos):
        assert special_tokens(plain) == ([], [])
        assert special_tokens(with_bos) == ([BOS], [])

    @pytest.mark.parametrize("whole", [False, True])
    def test_bos_opens_every_sequence_and_counts(self, with_bos, documents, whole):
        built = build_calibration_set(
            with_bos, source=documents, scales=(4, 8), tokens=64, whole_documents=whole
        )
        assert sum(built.lengths) == 64 and set(built.lengths) <= {4, 8}
        for sequence in built.sequences:
            assert sequence[0] == BOS and BOS not in sequence[1:]
        assert built.record()["special_prefix"] == [BOS]

    def test_a_tokenizer_that_ends_texts_with_eos(self, make_tokenizer, with_bos, documents):
        ending = make_tokenizer(bos=True, single="<bos> $A <end>")
        assert len(ending("w1")["input_ids"]) == 3 and special_tokens(ending)[0] == [BOS]
        one, other = (
            build_calibration_set(tokenizer, source=documents, scales=(4, 8), tokens=64)
            for tokenizer in (ending, with_bos)
        )
        assert one.record() == other.record()


class TestIds:
    """Tokens that the model has no embedding for; the vocabulary of ``plain`` has 406."""

    def test_a_token_of_the_text_is_named(self, plain):
        plain.add_tokens(["w999"])
        ids = plain("w1 w999")["input_ids"]
        assert ids[1] == 406
        with pytest.raises(UserError, match=r"ids below 406 .* gives 406 \('w999'\)"):
            check_ids([[], ids], plain, 406, "org/base")

    @pytest.mark.parametrize(("rows", "refused"), [(405, True), (406, False), (512, False)])
    def test_a_vocabulary_larger_than_the_embedding(self, plain, rows, refused):
        plain.add_tokens(["<image>"])  # as Gemma 3's, which texts do not use
        if not refused:
            return check_ids([[1, 2]], plain, rows, "org/base")
        with pytest.raises(UserError, match=r"gives 405 \('w399'\): give the tokenizer that"):
            check_ids([[1, 2]], plain, rows, "org/base")


class TestDocuments:
    def test_few_that_give_all_windows_are_warned_of_and_recorded(self, plain, warnings):
        source = [words(n % 300, 3) for n in range(40)] + [words(0, 300)]
        built = build_calibration_set(plain, source=source, scales=(8,), tokens=80)
        assert built.record()["documents"] == {"given": 41, "read": 41, "usable": 1, "used": 1}
        (warning,) = warnings
        assert "10 windows come from 1 of 41 documents" in warning

    def test_many_are_not(self, plain, documents, warnings):
        build_calibration_set(plain, source=documents, scales=(4, 8), tokens=100)
        assert not warnings


class TestChats:
    def test_goes_through_the_template_with_one_bos(self, chatty):
        conversation = chat(words(0, 3), words(10, 2))
        built = build_calibration_set(
            chatty, source=[conversation], scales=None, tokens=10, whole_documents=True
        )
        text = f"<bos> <user> {words(0, 3)} <end> <assistant> {words(10, 2)} <end>"
        expected = chatty(text, add_special_tokens=False)["input_ids"]
        assert [sequence.tolist() for sequence in built.sequences] == [expected]

    def test_bos_is_added_where_the_template_has_none(self, make_tokenizer, chatty):
        template = chatty.chat_template.removeprefix("<bos> ")
        tokenizer = make_tokenizer(bos=True, chat_template=template)
        built = build_calibration_set(
            tokenizer, source=[chat(words(0, 3))], scales=None, tokens=6, whole_documents=True
        )
        assert built.sequences[0].tolist() == tokenizer(f"<user> {words(0, 3)} <end>")["input_ids"]

    def test_messages_column_of_a_dataset(self, chatty):
        data = Dataset.from_dict({"messages": [chat(words(0, 20), words(20, 20))]})
        built = build_calibration_set(chatty, source=data, scales=(8,), tokens=32)
        assert built.lengths == [8] * 4

    def test_no_template(self, plain):
        with pytest.raises(UserError, match="no chat template"):
            build_calibration_set(plain, source=[chat("w1")], scales=(2,), tokens=2)

    def test_chat_that_does_not_fit(self, make_tokenizer):
        tokenizer = make_tokenizer(chat_template="{{ raise_exception('Roles must alternate') }}")
        refusal = r"list item 1: .* \(Roles must alternate\): mend or remove it \(its roles: user\)"
        with pytest.raises(UserError, match=refusal):
            build_calibration_set(tokenizer, source=[chat("w1")], scales=(2,), tokens=2)


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"scales": ()}, "give positive lengths"),
            ({"scales": (0, 4)}, "lengths 0,4: give positive lengths"),
            ({"scales": (8, 4)}, "lengths 8,4 are not increasing"),
            ({"scales": (4, 4)}, "not increasing"),
            ({"scales": None}, "no lengths"),
            (
                {"scales": (4, 64), "max_context": 32},
                "length 64 is longer than the model's context",
            ),
            ({"scales": (4, 64)}, r"length 64 is longer than any text at hand \(40 tokens\)"),
            ({"scales": (8,), "tokens": 7}, r"budget \(7\) is below the shortest length \(8\)"),
            ({"tokens": 0}, "budget is 0"),
            ({"tokens": 10_000}, "too little text: 20 windows of 16 tokens where 208 are needed"),
            ({"tokens": 10_000, "whole_documents": True}, "10 whole documents of 160 tokens"),
            ({"balance": "even"}, "balance is 'even'"),
            ({"source": [" "]}, "holds no text"),
            ({"source": Dataset.from_dict({"text": ["", " "]})}, "hold no text"),
            ({"text_column": "body", "source": [{"text": "a"}]}, "no column 'body'"),
        ],
    )
    def test_one_line_naming_the_culprit(self, plain, documents, kwargs, message):
        kwargs = {"source": documents, "scales": (4, 8, 16), "tokens": 48} | kwargs
        with pytest.raises(UserError, match=message) as caught:
            build_calibration_set(plain, **kwargs)
        assert "\n" not in str(caught.value)

    def test_scale_without_room_for_text(self, with_bos, documents):
        with pytest.raises(UserError, match="leaves no room for text after 1 special tokens"):
            build_calibration_set(with_bos, source=documents, scales=(1, 4), tokens=8)


class TestDataloader:
    @pytest.fixture
    def built(self, plain, documents):
        return build_calibration_set(plain, source=documents, scales=(4, 8, 16), tokens=144)

    def test_one_by_one_unpadded_in_order(self, built):
        loader = built.dataloader()
        assert len(loader) == len(built.sequences)
        for _ in range(2):  # a second pass sees the same
            for batch, sequence in zip(loader, built.sequences, strict=True):
                assert set(batch) == {"input_ids", "attention_mask"}
                assert torch.equal(batch["input_ids"], sequence[None])
                assert batch["attention_mask"].all()

    @pytest.mark.parametrize("batch_tokens", [16, 20, 1000])
    def test_sequences_of_one_length_share_a_batch(self, built, batch_tokens):
        loader = built.dataloader(batch_tokens)
        rows = []
        for batch in loader:
            assert batch["attention_mask"].all()  # nothing is padded
            assert batch["input_ids"].numel() <= batch_tokens
            rows += list(batch["input_ids"])
        assert len(loader) == len(list(loader)) < len(built.sequences)
        for length in (4, 8, 16):
            of_length = [row for row in rows if len(row) == length]
            expected = [row for row in built.sequences if len(row) == length]
            assert all(map(torch.equal, of_length, expected)) and len(of_length) == len(expected)

    def test_writing_into_a_batch_leaves_the_set_alone(self, built):
        before = built.record()["sha256"]
        for batch in built.dataloader():
            batch["input_ids"].zero_()
        assert built.record()["sha256"] == before

    def test_a_batch_of_nothing_is_refused(self, built):
        with pytest.raises(UserError, match="batch tokens are 0: give 1 or more"):
            built.dataloader(0)


def test_record(plain, documents):
    built = build_calibration_set(plain, source=documents, scales=(4, 8), tokens=64, seed=5)
    record = json.loads(json.dumps(built.record()))
    assert len(record.pop("sha256")) == 64
    assert record == {
        "source": "a list of 10 documents",
        "seed": 5,
        "sequences": 12,
        "tokens": 64,
        "lengths": {"4": 8, "8": 4},
        "scales": [4, 8],
        "balance": "tokens",
        "whole_documents": False,
        "special_prefix": [],
        "documents": {"given": 10, "read": 10, "usable": 10, "used": 10},
    }


def test_oneshot_sees_exactly_these_sequences(with_bos, documents, tmp_path):
    """Through llm-compressor itself: every sequence, unpadded and uncut, in the set's order."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=406,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with_bos.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    built = build_calibration_set(with_bos, source=documents, scales=(4, 8, 16), tokens=144)
    embedded, projected = [], []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: embedded.append(args[0].clone())
    )
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: projected.append(args[0].shape[1])
    )
    recipe = GPTQModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"])
    oneshot(model=model, dataset=built.dataloader(), recipe=recipe)
    count = len(built.sequences)
    embedded = [ids for ids in embedded if not ids.is_meta]  # tracing
    assert len(embedded) == 2 * count  # a calibrating pass and a propagating one
    for number, ids in enumerate(embedded):
        assert torch.equal(ids, built.sequences[number % count][None])
    assert projected == 2 * built.lengths
