"""Hop-by-hop headers stay on their hop, credentials with the router."""

from multidict import CIMultiDict, CIMultiDictProxy

from hpc_router.relay.headers import downstream_headers, upstream_headers


def proxy(**items: str) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict({k.replace("_", "-"): v for k, v in items.items()}))


def test_upstream_never_sees_credentials_nor_hop_headers() -> None:
    given = proxy(
        Authorization="Bearer owner", Cookie="c=1", X_Api_Key="k", Connection="keep-alive, X-Mine", X_Mine="1",
        Transfer_Encoding="chunked", Host="router", X_Session_Id="s", Content_Type="application/json",
    )  # fmt: skip
    sent = upstream_headers(given, add={"Authorization": "Bearer replica"})
    assert dict(sent) == {
        "X-Session-Id": "s",
        "Content-Type": "application/json",
        "Authorization": "Bearer replica",
    }


def test_downstream_keeps_what_the_engine_says_of_its_answer() -> None:
    given = proxy(Content_Type="text/event-stream", Retry_After="3", Server="uvicorn", Connection="close", X_Other="1")
    assert dict(downstream_headers(given, add={"x-replica": "math-0.g1"})) == {
        "Content-Type": "text/event-stream",
        "Retry-After": "3",
        "X-Other": "1",
        "x-replica": "math-0.g1",
    }
