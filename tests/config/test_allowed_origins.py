"""`router.allowed_origins` has origins exactly as browsers send them; another spelling would never match."""

import pytest

from hpc_router.cluster.commands.set import parse_settings
from hpc_router.config.compose import load_deployment
from hpc_router.config.schema import RouterConfig
from hpc_router.config.validation import check_router
from hpc_router.errors import ConfigError
from hpc_router.router.settings import with_settings


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "*",
            "http://localhost:3000",
            "https://a.example.org",
            "http://10.1.2.3",
            "http://[::1]:8080",
            "https://x-y.z",
        ),
        *("http://node_7:1", "https://xn--bcher-kva.example", "chrome-extension://abcdef", "app://obsidian.md"),
        *("http://localhost:443", "https://localhost:80", "http://a:65535"),
    ],
)
def test_valid_origins(origin: str) -> None:
    check_router(RouterConfig(allowed_origins=[origin]))


@pytest.mark.parametrize(
    ("origin", "near"),
    [
        ("http://localhost:3000/", "http://localhost:3000"),
        ("http://localhost:3000/app?x=1#y", "http://localhost:3000"),
        ("HTTP://LocalHost:3000", "http://localhost:3000"),
        (" http://localhost:3000", "http://localhost:3000"),
        ("http://localhost:80", "http://localhost"),
        ("https://a.example.org:443", "https://a.example.org"),
        ("http://user@localhost:3000", "http://localhost:3000"),
        ("http://localhost:03000", "http://localhost:3000"),
        ("localhost:3000", None),
        ("localhost", None),
        ("http://", None),
        ("http://a b", None),
        ("http://a:65536", None),
        ("http://a:x", None),
        ("http://bücher.example", None),
        ("http://*.example.org", None),
        ("http://a\nb", "http://ab"),
        ("null", None),
        ("", None),
    ],
)
def test_other_values_are_refused_with_the_nearest_origin(origin: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        check_router(RouterConfig(allowed_origins=["*", origin]))
    message = str(caught.value)
    assert message.startswith(f"router.allowed_origins: '{origin}' is not the origin of a web page")
    assert caught.value.key == "router.allowed_origins"
    assert ("did you mean" in message) is (near is not None)
    assert near is None or f"did you mean '{near}'?" in message


@pytest.mark.parametrize(
    "text", ["[http://localhost:3000]", "['http://localhost:3000']", "[http://localhost:3000,'*']"]
)
def test_the_forms_of_an_override(text: str) -> None:
    deployment = load_deployment(["topology=sim", f"router.allowed_origins={text}"])
    assert deployment.router.allowed_origins[0] == "http://localhost:3000"


@pytest.mark.parametrize(
    "text",
    ["http://a:1,https://b", "[http://a:1,https://b]", "['http://a:1', \"https://b\"]", "[http://a:1, https://b,]"],
)
def test_the_forms_of_a_setting(text: str) -> None:
    values, reset = parse_settings([f"router.allowed_origins={text}"])
    changed = with_settings(load_deployment(["topology=sim"]), values)
    assert changed.router.allowed_origins == ["http://a:1", "https://b"]
    assert parse_settings(["router.allowed_origins=[]"])[0] == {"router.allowed_origins": []}
    assert parse_settings(["router.allowed_origins="])[1] == ["router.allowed_origins"]
    assert reset == []
    with pytest.raises(ConfigError, match=r"'http://a/' is not the origin"):
        with_settings(changed, parse_settings(["router.allowed_origins=http://a/"])[0])
