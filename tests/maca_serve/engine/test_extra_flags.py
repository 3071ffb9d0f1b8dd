import pytest
from maca_serve.common.errors import UserError
from maca_serve.engine.extra_flags import check_flags


def test_flags_of_vllm_pass_with_their_values():
    flags = ["--enable-prefix-caching", "--dtype", "float32", "--seed=1", "-O3", "--no-such-flag"]
    assert check_flags(flags) == flags
    assert check_flags([]) == []


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--port", "put it before the `--`"),
        ("--port=8001", "put it before the `--`"),
        ("--api_key", "use VLLM_API_KEY in the environment"),
        ("--tensor_parallel_size=2", "use --tp before the `--`"),
        ("-pp", "use --pp before the `--`"),
        ("--hos", "put it before the `--`"),
        ("--ssl-keyfile", "use a proxy that speaks TLS"),
    ],
)
def test_flags_that_maca_serve_sets_do_not(flag, instead):
    with pytest.raises(UserError, match=f"^{flag}: maca-serve sets .*{instead}$"):
        check_flags(["--seed", "1", flag, "x"])


@pytest.mark.parametrize("flag", ["--config", "--config=x", "--grpc", "--headless", "--grpc_port"])
def test_flags_that_would_serve_something_else(flag):
    with pytest.raises(UserError, match=f"^{flag}: cannot be passed on: "):
        check_flags([flag, "x"])
    assert check_flags(["--config-format", "hf"]), "another flag"


def test_a_second_folder_is_no_flag():
    with pytest.raises(UserError, match="'other': give one DIR; flags for vLLM follow `--`"):
        check_flags(["other"])
