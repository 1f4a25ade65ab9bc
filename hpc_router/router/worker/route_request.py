"""Chooses the experts of a request: by its model name, by its session, or for `auto` by the policy."""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, get_args
from urllib.parse import parse_qs

from hpc_router.config.schema import ColdStart, Deployment
from hpc_router.errors import BadRequestError, ExpertForbiddenError, UnknownModelError, suggest
from hpc_router.net import protocol
from hpc_router.relay.api_formats import api_format_of
from hpc_router.relay.downstream.interface import Request
from hpc_router.relay.headers import Headers
from hpc_router.router.access.user_access import UserAccess
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.admission import should_spill
from hpc_router.router.replicas.fair_order import CLASSES, RequestClass
from hpc_router.router.replicas.sessions import PARAM, Sessions, session_id
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.capabilities import SHORT_TOKENS, lacking
from hpc_router.router.worker.dispatcher import Dispatcher
from hpc_router.router.worker.request_body import MEDIA_KINDS, ApiCall, check_values, decode
from hpc_router.router.worker.routed_request import ApiEndpoint, RoutedRequest
from hpc_router.router.worker.stored_responses import StoredResponses, not_found
from hpc_router.routing.policy import Decision, Explanation, Policy, RouteReason
from hpc_router.routing.prompt_text import Prompt, user_prompt
from hpc_router.state.registry import split_replica

COLD_STARTS: Final = get_args(ColdStart)
_NAMED: Final = RouteReason.NAMED
_OPTIONAL_BOOL: Final = frozenset({bool, type(None)})
_NONE: Final = frozenset[str]()
_MAX_LIMITED: Final = 100
"""Maximum number of policies that are kept for different sets of experts."""
CLASS_NAMES: Final = {of.label: of for of in CLASSES}
"""The classes by their names in requests."""
_TRUE_WORDS: Final = ("true", "t", "yes", "y", "on", "1")


def endpoint_of(request: Request) -> ApiEndpoint:
    """Returns the API endpoint of the request. Raises BadRequestError if the request states an unknown class."""
    path = request.path.rstrip("/")
    target = f"{path}?{request.query}" if request.query else path
    wait = request.headers.text(protocol.WAIT_HEADER) or None
    return ApiEndpoint(path, target, api_format_of(path), class_of(request.headers), wait)


def class_of(headers: Headers) -> RequestClass:
    """Returns the class (interactive or batch) that a request states in a header; interactive if it states none. Raises
    BadRequestError for an unknown class."""
    name = headers.text(protocol.PRIORITY_HEADER)
    if not name:
        return RequestClass.INTERACTIVE
    found = CLASS_NAMES.get(name.strip().lower())
    if found is None:
        valid = suggest(name, CLASS_NAMES)
        raise BadRequestError(
            f"{protocol.PRIORITY_HEADER}: {name[:80]!r} is not a class{valid}", param=protocol.PRIORITY_HEADER
        )
    return found


def is_true(value: object) -> bool:
    """Returns whether an engine reads `value`, in a request's JSON, as true: `true`, 1 and words such as "yes", like
    pydantic in vLLM. False for any other value, also if the engine will refuse the request because of it."""
    return value == 1 or (isinstance(value, str) and value.lower() in _TRUE_WORDS)


@dataclass(slots=True)
class RequestRouting:
    """Finds the experts of one worker's requests. When the settings change, `policy` and `deployment` are replaced;
    requests that are already routed keep their experts."""

    deployment: Deployment
    table: ReplicaTable
    policy: Policy
    dispatcher: Dispatcher
    metrics: Metrics
    sessions: Sessions
    _limited: tuple[Policy | None, dict[frozenset[str], Policy]] = field(default_factory=lambda: (None, {}))

    def route(
        self,
        request: Request,
        request_id: str,
        call: ApiCall,
        endpoint: ApiEndpoint,
        access: UserAccess | None = None,
    ) -> RoutedRequest:
        """Returns the request with the experts that may serve it. `call`: its body. `access`: what the user's token
        allows; None: everything.

        Raises BadRequestError, UnknownModelError, ExpertForbiddenError or PreviousResponseNotFoundError.
        """
        started = time.perf_counter()
        model = call.fields.get("model")
        if type(model) is not str or not model:
            model = call.model  # raises
        if type(call.fields.get("stream")) not in _OPTIONAL_BOOL:
            call.fields["stream"] = is_true(call.fields["stream"])
        if endpoint.wait is not None and endpoint.wait not in COLD_STARTS:
            raise BadRequestError(
                f"{protocol.WAIT_HEADER} is '{endpoint.wait[:100]}' (valid: {', '.join(COLD_STARTS)})",
                param=protocol.WAIT_HEADER,
            )
        session = None
        if endpoint.path == protocol.RESPONSES:
            session = session_id(request.headers)
            continued = self.sessions.continued(session, call.fields, self.table, model=model)
            if continued is not None:
                turn, replica = continued
                if access is not None:
                    access.check_expert(turn.expert)
                reason = turn.reason if model == "auto" else RouteReason.NAMED
                routed = RoutedRequest(
                    self.dispatcher, request, request_id, call, endpoint, (turn.expert,), reason, started
                )
                routed.only = replica
                return routed
        if model != "auto":
            if model not in self.deployment.experts and not self.table.of(model):
                raise self.unknown(model, access)
            if access is not None:
                access.check_expert(model)
            routed = RoutedRequest(self.dispatcher, request, request_id, call, endpoint, (model,), _NAMED, started)
        else:
            experts, reason, decision, version = self._choose_experts(call, endpoint, access)
            routed = RoutedRequest(self.dispatcher, request, request_id, call, endpoint, experts, reason, started)
            routed.decision, routed.artefact = decision, version
        if session is not None:
            routed.on_success = partial(self.sessions.answered, session)
        return routed

    def charge(self, routed: RoutedRequest, access: UserAccess) -> None:
        """Assigns the request to the user of the token, and counts it against the token's limits. Raises
        RateLimitedError if a limit is reached."""
        routed.user, routed.user_slot = access.token.user, access.token.slot
        if not access.unlimited:
            routed.charge = access.charge(routed.endpoint.path, routed.call.fields, routed.experts[0])

    def policy_for(self, access: UserAccess | None) -> Policy:
        """Returns the policy, limited to the experts that the token allows; the whole policy if `access` is None."""
        if access is None or access.experts is None:
            return self.policy
        return self._limited_to(access.experts)

    def _limited_to(self, experts: frozenset[str]) -> Policy:
        policy = self.policy
        if self._limited[0] is not policy or len(self._limited[1]) >= _MAX_LIMITED:
            self._limited = policy, {}
        limited = self._limited[1].get(experts)
        if limited is None:
            limited = self._limited[1][experts] = policy.limited_to(experts)
        return limited

    def unable(self, call: ApiCall, access: UserAccess | None) -> frozenset[str]:
        """Returns those of the experts that the token allows which do not accept the request `call`. Raises
        BadRequestError if none of them accepts it."""
        needs = call.needs()
        tokens = 0 if needs & MEDIA_KINDS else call.estimated_tokens()  # the bytes of media are no tokens
        if not needs and (tokens < SHORT_TOKENS or tokens <= self.table.shortest_context()):
            return _NONE
        experts = self.experts() if access is None else access.allowed(self.experts())
        unable = lacking(experts, needs, tokens, deployment=self.deployment, table=self.table)
        if unable and len(unable) == len(experts):
            kinds = " and ".join(sorted(needs))
            raise BadRequestError(
                f"'auto' can choose no expert: none accepts {kinds} (experts.NAME.accepts says what an expert accepts)",
                param="model",
            )
        return unable

    def among_able(
        self,
        unable: frozenset[str],
        prompt: Prompt,
        wanted: Decision,
        experts: tuple[str, ...],
        access: UserAccess | None,
    ) -> tuple[Decision, tuple[str, ...]]:
        """Returns the decision, and the experts in the order in which they are tried, without the experts in `unable`.
        `wanted`, `experts`: decision and order among all experts. `access`: what the user's token allows."""
        if experts and experts[0] not in unable:
            return wanted, tuple(expert for expert in experts if expert not in unable)
        allowed = self.experts() if access is None else access.allowed(self.experts())
        able = frozenset(allowed) - unable
        policy, ready = self._limited_to(able), self.table.ready()
        decision = policy.select(prompt, ready=ready)
        order = policy.order(decision) or tuple(sorted(able, key=lambda name: (name not in ready, name)))
        return decision._replace(expert=next(iter(order), None), reason=RouteReason.CAPABILITY), order

    def explain(self, call: ApiCall, access: UserAccess | None) -> Explanation:
        """Returns how the request `call`, made for `auto`, would be routed, and why. Raises BadRequestError."""
        policy, prompt = self.policy_for(access), self.prompt(call)
        explanation = policy.explain(prompt, ready=self.table.ready())
        unable = self.unable(call, access)
        if unable:
            wanted = explanation.decision
            decision, _ = self.among_able(unable, prompt, wanted, policy.order(wanted), access)
            explanation = replace(explanation, decision=decision)
        return explanation

    async def route_stored(
        self, request: Request, request_id: str, session: str | None, access: UserAccess | None = None
    ) -> RoutedRequest:
        """Routes a request about an earlier response, whose id is in the path, to the replica that stores the response.
        `session`: the request's session id. Raises ResponseNotFoundError, UnavailableError or ExpertForbiddenError."""
        started = time.perf_counter()
        endpoint = endpoint_of(request)
        stored = protocol.STORED_RESPONSE.fullmatch(endpoint.path)
        assert stored is not None
        response_id = stored[1]
        turn = None if session is None else self.sessions.find(session)
        replica = await StoredResponses(self.table, self.dispatcher.client).find(response_id, turn=turn)
        own = split_replica(replica.name)[0]  # the expert that owns the job, if several share an engine
        expert = turn.expert if turn is not None and turn.is_at(replica) else own
        if access is not None:
            access.check_expert(expert)
        fields = {
            "model": replica.record.serves.get(expert),
            "stream": parse_qs(request.query).get("stream") == ["true"],
        }
        call = ApiCall(b"", fields)
        routed = RoutedRequest(self.dispatcher, request, request_id, call, endpoint, (expert,), _NAMED, started)
        routed.method = "GET" if request.method == "HEAD" else request.method
        routed.repeatable = routed.method == "GET"
        routed.only, routed.lost_error = replica, partial(not_found, response_id)
        return routed

    def _choose_experts(
        self, call: ApiCall, endpoint: ApiEndpoint, access: UserAccess | None
    ) -> tuple[tuple[str, ...], RouteReason, Decision, str | None]:
        """Lets the policy choose for `auto`. Returns the experts in the order in which they are tried, the reason for
        the first one, the policy's decision, and the version of the classifier; None without a classifier. Raises
        BadRequestError, UnknownModelError or ExpertForbiddenError."""
        if endpoint.path in protocol.INCOMPARABLE_PATHS:
            raise BadRequestError(
                f"'auto' cannot be the model at {endpoint.path}: the vectors, scores and tokens of experts differ, so "
                "name one",
                param="model",
            )
        policy = self.policy if access is None else self.policy_for(access)
        prompt = self.prompt(call, first=endpoint.api_format.prompt_field)
        decision = self._decide(policy, prompt)
        experts = policy.order(decision)
        unable = self.unable(call, access)
        if unable:
            decision, experts = self.among_able(unable, prompt, decision, experts, access)
        if not experts and access is not None and access.experts is not None:
            raise ExpertForbiddenError(
                f"'auto' can choose none of the experts of this token{suggest('', access.experts)}", param="model"
            )
        if not experts:
            raise UnknownModelError(
                "no expert is available for model 'auto', and policy.fallback is not set" + suggest("", self.experts()),
                param="model",
            )
        if self.deployment.policy.spill_per_s is not None and self._spills(decision):
            assert decision.runner_up is not None
            spilled = tuple(dict.fromkeys((decision.runner_up, *experts)))
            return spilled, RouteReason.SPILLED, decision, policy.version
        mode = endpoint.wait or self.deployment.router.cold_start
        return self.table.without_fallback(experts, mode), decision.reason, decision, policy.version

    def _spills(self, decision: Decision) -> bool:
        """Returns whether the request goes to the runner-up: the chosen expert has no free place, the runner-up has
        one, and the expected wait costs more than the difference of the two scores (`should_spill`)."""
        expert, other, per_s = decision.expert, decision.runner_up, self.deployment.policy.spill_per_s
        if decision.reason is not RouteReason.CLASSIFIED or expert is None or other is None or per_s is None:
            return False
        if self.table.pick((expert,)) is not None or self.table.pick((other,)) is None:
            return False
        return should_spill(margin=decision.margin or 0.0, wait_s=self.table.wait_s(expert), per_s=per_s)

    def read_long(self, body: bytes, path: str) -> ApiCall:
        """Checks and decodes a long body. Also finds its model name, and extracts the prompt if the policy needs it.
        Runs in a thread, because the duration grows with the length of the body."""
        check_values(body)
        call = decode(body)
        model = call.fields.get("model")
        if isinstance(model, str) and model:
            call.model_span  # noqa: B018  # cached for `body`
        if "priority" in call.fields:
            call.priority_span  # noqa: B018  # cached for `with_priority`
        continued = path == protocol.RESPONSES and call.fields.get(PARAM) is not None
        if path == "/route" or (model == "auto" and not continued):
            call.prompt = self.prompt(call, first=api_format_of(path).prompt_field)
            call.needs()  # cached for the choice of an expert
        return call

    def prompt(self, call: ApiCall, *, first: str = "messages") -> Prompt:
        """Returns the text or the conversation by which the policy decides. `first`: the field of the body that is read
        if the body has it (see `prompt_text`)."""
        if call.prompt is not None:
            return call.prompt
        return user_prompt(call.fields, window=self.deployment.policy.window, first=first)

    def _decide(self, policy: Policy, prompt: Prompt) -> Decision:
        """Returns the policy's decision for the prompt, and counts it. If there is a shadow policy, also counts
        whether it chooses the same expert."""
        metrics = self.metrics
        started = time.perf_counter()
        decision = policy.select(prompt, ready=self.table.ready() if policy.weighs_load else {})
        metrics.decision.add(time.perf_counter() - started)
        version = policy.version
        if version is not None:
            metrics.decided.add(version, decision.cluster or "", decision.reason)
            shadow = policy.shadow
            if shadow is not None:  # only counted
                agreed = shadow.select(prompt, ready={}).expert == decision.expert
                self.metrics.shadowed.add(version, shadow.version, "yes" if agreed else "no")
        return decision

    def experts(self) -> set[str]:
        return self.table.experts() | set(self.deployment.experts)

    def model_names(self, access: UserAccess | None = None) -> list[str]:
        """Returns the names of the models that the token allows. `access`: what the token allows; None: everything."""
        experts = self.experts()
        return ["auto", *sorted(experts if access is None else access.allowed(experts))]

    def unknown(self, name: str, access: UserAccess | None = None) -> UnknownModelError:
        """Returns the error for a model name that does not exist. It suggests names that the token allows."""
        valid = self.model_names(access)
        return UnknownModelError(f"no model is named {name[:100]!r}{suggest(name, valid)}", param="model")
