from speechllm.config.fields import sections
from speechllm.config.reference import config_reference


def test_every_key_stands_in_the_reference_with_a_description():
    reference = config_reference()
    for _, _, cls in sections():
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name} needs a description"
            assert f"| `{name}` |" in reference
            assert field.description.replace("|", r"\|") in reference


def test_types_bounds_and_defaults_are_shown():
    rows = set(config_reference().splitlines())
    assert (
        "| `betas` | list of 2: number, ≥ 0, < 1 | `[0.9, 0.999]` "
        "| Decay rates of Adam's moments. |"
    ) in rows
    assert "| `run_dir` | text or none | none | Where everything of the run is written. |" in rows
    assert any(row.startswith("| `id` | text | required | Hub id") for row in rows)
    assert any(row.startswith("| `connector` | section of a kind: `transformer`") for row in rows)
