import pytest

from hpc_router.errors import ConfigError
from hpc_router.sim.fault_schedule import FaultSchedule
from hpc_router.sim.faults import CONNECT, HEADERS, Fault, FaultKind, ResponseForm, parse_fault, parse_rules

CHAT = "/v1/chat/completions"


def script(*rules: dict[str, object], seed: int = 0) -> FaultSchedule:
    return FaultSchedule(parse_rules(list(rules)), seed=seed)


def struck(
    faults: FaultSchedule, *, path: str = CHAT, model: str = "math", answer: ResponseForm = ResponseForm.STREAM
) -> FaultKind | None:
    _, fault = faults.select(path, model=model, answer=answer)
    return None if fault is None else fault.kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("7", "a JSON list of objects is needed"),
        ("[7]", r"faults\[0\]: an object with a 'kind'"),
        ("[{}]", "unknown kind None"),
        ('[{"kind": "dye"}]', "unknown kind 'dye'; did you mean 'die'"),
        ('[{"kind": "die"}, {"kind": "die", "att": 1}]', r"faults\[1\]: unknown key 'att'.*did you mean 'at'"),
        ('[{"kind": "hang", "factor": 1}]', "unknown key 'factor' for kind 'hang'"),
        ('[{"kind": "die", "at": "hedaers"}]', "did you mean 'headers'"),
        ('[{"kind": "die", "at": -1}]', "'at' is -1; valid: a number of tokens from 0"),
        ('[{"kind": "die", "at": true}]', "'at' is True"),
        ('[{"kind": "die", "at": "connect"}]', "die cannot be injected at 'connect'"),
        ('[{"kind": "cut", "at": "headers"}]', "cut cannot be injected at 'headers'"),
        ('[{"kind": "status", "status": 200}]', "'status' is 200"),
        ('[{"kind": "status", "status": 600}]', "status 600"),
        ('[{"kind": "status", "message": 1}]', "'message' is 1; a string is needed"),
        ('[{"kind": "slow", "factor": -1}]', "'factor' is -1"),
        ('[{"kind": "slow", "factor": NaN}]', "'factor' is nan"),
        ('[{"kind": "die", "every": 0}]', "'every' is 0"),
        ('[{"kind": "die", "times": 1.5}]', "'times' is 1.5"),
        ('[{"kind": "die", "probability": 1.1}]', "'probability' is 1.1; a number from 0 to 1"),
        ('[{"kind": "reset", "path": "/x"}]', "a reset at connect has neither path nor model"),
        ('[{"kind": "load_fail", "reason": "weihgts"}]', "did you mean 'weights'"),
        ('[{"kind": "load_fail", "times": 1}]', "needs 'counter'"),
    ],
)
def test_an_invalid_fault_is_refused_with_the_valid_ones(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rules(text)


def test_positions_have_names_and_kinds_have_their_own_defaults() -> None:
    rules = parse_rules('[{"kind":"hang"},{"kind":"die"},{"kind":"reset"},{"kind":"hang","at":"first_token"}]')
    assert [rule.fault.at for rule in rules] == [HEADERS, 0, CONNECT, 0]


def test_one_object_counts_as_a_list_of_one() -> None:
    assert len(parse_rules('{"kind": "slow"}')) == 1


def test_a_request_brings_no_selectors_and_no_load_failure() -> None:
    with pytest.raises(ConfigError, match="unknown key 'times'"):
        parse_fault({"kind": "die", "times": 1}, where="header")
    with pytest.raises(ConfigError, match="at the start only"):
        parse_fault({"kind": "load_fail"}, where="header")
    assert parse_fault('{"kind": "reset"}', where="header") == Fault(kind=FaultKind.RESET, at=HEADERS)


def test_times_limits_how_many_requests_are_hit() -> None:
    faults = script({"kind": "die", "times": 2})
    assert [struck(faults) for _ in range(4)] == [FaultKind.DIE, FaultKind.DIE, None, None]


def test_times_zero_never_strikes() -> None:
    assert struck(script({"kind": "die", "times": 0})) is None


def test_every_hits_each_nth_match() -> None:
    faults = script({"kind": "die", "every": 3})
    assert [struck(faults) is not None for _ in range(7)] == [False, False, True, False, False, True, False]


def test_probability_is_seeded() -> None:
    def run(seed: int) -> list[bool]:
        faults = script({"kind": "die", "probability": 0.5}, seed=seed)
        return [struck(faults) is not None for _ in range(200)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert 60 < sum(run(1)) < 140


def test_filters_let_other_requests_pass_without_using_the_rule_up() -> None:
    faults = script({"kind": "die", "path": CHAT, "model": "math", "times": 1})
    assert struck(faults, path="/v1/completions") is None
    assert struck(faults, model="code") is None
    assert struck(faults) is FaultKind.DIE


def test_what_an_answer_cannot_express_does_not_match_it() -> None:
    faults = script({"kind": "cut", "times": 1}, {"kind": "partial_body", "times": 1})
    assert struck(faults, answer=ResponseForm.BODY) is FaultKind.PARTIAL_BODY
    assert struck(faults, answer=ResponseForm.STREAM) is FaultKind.CUT
    assert struck(faults, answer=ResponseForm.STREAM) is None


def test_paths_that_compute_nothing_are_hit_only_when_named() -> None:
    faults = script({"kind": "hang"}, {"kind": "status", "path": "/health"})
    assert struck(faults, path="/health", answer=ResponseForm.OTHER) is FaultKind.STATUS
    assert struck(faults, path="/metrics", answer=ResponseForm.OTHER) is None


def test_slowness_multiplies_and_the_first_other_fault_strikes() -> None:
    faults = script({"kind": "slow", "factor": 3}, {"kind": "slow"}, {"kind": "hang"}, {"kind": "die"})
    assert faults.select(CHAT, model=None, answer=ResponseForm.STREAM) == (6.0, Fault(kind=FaultKind.HANG, at=HEADERS))
    assert [entry["hits"] for entry in faults.describe()] == [1, 1, 1, 0]


def test_connections_are_reset_apart_from_requests() -> None:
    faults = script({"kind": "reset", "times": 1})
    assert struck(faults) is None
    assert [faults.at_connect(), faults.at_connect()] == [True, False]


def test_faults_set_at_run_time_refuse_load_failures_and_keep_the_old_ones() -> None:
    faults = script({"kind": "die"})
    with pytest.raises(ConfigError, match="at the start only"):
        faults.load([{"kind": "load_fail"}])
    assert struck(faults) is FaultKind.DIE
    faults.load("[]")
    assert struck(faults) is None
