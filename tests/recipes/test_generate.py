import pytest

from hfllm.arguments import parse_arguments
from tests.recipes.conftest import load_recipe


@pytest.fixture
def generate(capsys):
    recipe = load_recipe("generate")

    def run(**options) -> str:
        capsys.readouterr()
        recipe.main(parse_arguments(recipe.GenerateArguments, [f"--{name}={value}" for name, value in options.items()]))
        return capsys.readouterr().out

    return run


@pytest.fixture
def model(run_pretrain, small):
    run_pretrain(**{**small, "max_steps": 40, "eval_steps": 40, "save_steps": 40, "learning_rate": 1e-2})
    return small["output_dir"]


def test_it_writes_what_the_model_makes_of_the_prompt(generate, model):
    text = generate(model=model, prompt="the cat", max_new_tokens=8)
    assert text.startswith("the cat")
    assert text == generate(model=model, prompt="the cat", max_new_tokens=8)
    assert text != generate(model=model, prompt="the cat", max_new_tokens=8, seed=1)


def test_greedy_writing_has_no_luck_in_it(generate, model):
    first = generate(model=model, prompt="a dog", do_sample=False, seed=1, max_new_tokens=6)
    assert first == generate(model=model, prompt="a dog", do_sample=False, seed=2, max_new_tokens=6)


def test_without_a_prompt_it_begins_a_document(generate, model):
    assert generate(model=model, max_new_tokens=6).strip()


def test_several_samples_have_several_seeds(generate, model):
    text = generate(model=model, prompt="my bird", num_samples=2, max_new_tokens=6)
    assert "--- sample 1, seed 42" in text and "--- sample 2, seed 43" in text


def test_the_context_limits_what_is_written_and_it_says_so(generate, model):
    assert "leaves room for" in generate(model=model, prompt="the cat", max_new_tokens=1000)
    with pytest.raises(ValueError, match="the model's context is 32"):
        generate(model=model, prompt="the cat sees a dog. " * 40)


def test_a_folder_without_a_model_says_what_to_do(generate, tmp_path):
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match=r"without a config.json.*log\.jsonl.*goes on"):
        generate(model=tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a model that the Hub gave us"):
        generate(model="nobody/nothing")
