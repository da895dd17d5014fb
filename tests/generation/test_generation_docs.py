"""The commands about generation in the README and in docs/."""

from reading import Reader, under


@under("README.md", "Your own text")
def test_samples(reader: Reader, typed: list[list[str]]):
    outs = reader.type_all(typed)
    assert (reader.fitted[-1] / "samples.jsonl").is_file()
    assert outs[-1].startswith("It was a dark") and len(outs[-1].strip()) > len("It was a dark")


@under("docs/pretraining.md", "Samples and generation")
def test_generate(reader: Reader, typed: list[list[str]]):
    reader.type(["python", "-m", "lm_lightning", "fit", "--config", "configs/gpt.yaml"])
    (out,) = reader.type_all(typed)
    assert out.startswith("It was a dark") and len(out.strip()) > len("It was a dark")
