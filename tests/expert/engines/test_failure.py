"""Exit status and last log lines give reason and message. The lines are real output of engines, some of them
shortened."""

import pytest

from hpc_router.config.schema import EngineConfig, EngineKind, ExpertConfig
from hpc_router.expert.engines import Engine, build_engine, classify
from hpc_router.expert.engines.failure import LAST_LINES, MESSAGE_LENGTH, EngineFailure
from hpc_router.state.job_records import FailureReason

PREFIX = "(EngineCore pid=19569) ERROR 11-22 18:20:12 [core.py:1510] "
AFTER = [
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
    "resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects",
]
"""The end of vLLM 0.32's output: worker processes log the reason with a prefix; the server's own last lines have
none."""

SAFETENSORS = "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: "
VLLM = [
    (FailureReason.KILLED, "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor."),
    (FailureReason.OUT_OF_MEMORY, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB."),
    (FailureReason.OUT_OF_MEMORY, "ValueError: No available memory for the cache blocks."),
    (
        FailureReason.OUT_OF_MEMORY,
        "'Available memory on node 0 (12.23/14.84 GiB) is less than requested memory for kv'",
    ),
    (FailureReason.OUT_OF_MEMORY, "ValueError: Free memory on device (1.0/79.1 GiB) on startup is less than desired"),
    (FailureReason.WEIGHTS, "RuntimeError: Cannot find any model weights with `/m`"),
    (FailureReason.WEIGHTS, "ValueError: Loading lora math failed: No adapter found for org/adapter"),
    (
        FailureReason.WEIGHTS,
        "ValueError: Call to add_lora method failed: Worker failed with error 'vLLM does not yet support",
    ),
    (
        FailureReason.BAD_OPTION,
        "ValueError: Call to add_lora method failed: 'LoRA rank 32 is greater than max_lora_rank 8.'",
    ),
    (FailureReason.WEIGHTS, "  Value error, Invalid repository ID or local directory specified: '/m'."),
    (FailureReason.WEIGHTS, "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name'"),
    (FailureReason.WEIGHTS, SAFETENSORS + "header too large"),
    (FailureReason.BAD_OPTION, "api_server.py: error: unrecognized arguments: --bogus"),
    (FailureReason.BAD_OPTION, "api_server.py: error: argument --dtype: invalid choice: 'floaty'"),
    (
        FailureReason.BAD_OPTION,
        "  Value error, Total number of attention heads (2) must be divisible by tensor parallel",
    ),
    (FailureReason.BAD_OPTION, "  Value error, Unknown quantization method: bogus. Must be one of ['awq', 'fp8']"),
    (FailureReason.CUDA, "RuntimeError: No CUDA GPUs are available"),
    (FailureReason.CUDA, "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"),
    (FailureReason.CUDA, "RuntimeError: Failed to infer device type"),
    (
        FailureReason.PORT_TAKEN,
        "torch.distributed.DistNetworkError: port: 4000, code: -98, name: EADDRINUSE, message: in use",
    ),
    (FailureReason.PORT_TAKEN, "zmq.error.ZMQError: Address already in use (addr='tcp://10.0.0.1:4000')"),
    (FailureReason.BAD_OPTION, "The following arguments are not implemented in Rust frontend yet:"),
    (
        FailureReason.BAD_OPTION,
        """error: invalid value '{"dtype": "bfloat16"}' for '--args-json <JSON>': invalid JSON arguments""",
    ),
    (FailureReason.BAD_OPTION, "  tool parser `zzz` is not registered (choose from: deepseek_v3, hermes)"),
    (
        FailureReason.WEIGHTS,
        "  tokenizer error: local model directory 'm' does not contain a supported tokenizer file (tokenizer.json)",
    ),
    (
        FailureReason.INTERPRETER,
        "FileNotFoundError: VLLM_RUST_FRONTEND_PATH=auto but the vllm-rs binary was not found at /e/vllm/vllm-rs.",
    ),
    (FailureReason.INTERPRETER, "PermissionError: [Errno 13] Permission denied: '/e/vllm/vllm-rs'"),
    (FailureReason.KILLED, "RuntimeError: Process RustFrontend (PID: 15110) died with exit code -9"),
]
TRANSFORMERS = [
    (FailureReason.OUT_OF_MEMORY, "RuntimeError: DefaultCPUAllocator: not enough memory: you tried to allocate"),
    (FailureReason.WEIGHTS, SAFETENSORS + "incomplete metadata, file not fully covered"),
    (
        FailureReason.WEIGHTS,
        "OSError: Error no file named model.safetensors, or pytorch_model.bin, found in directory /m.",
    ),
    (FailureReason.WEIGHTS, "ValueError: Unrecognized processing class in /m. Can't instantiate a processor"),
    (FailureReason.WEIGHTS, "OSError: We couldn't connect to 'x', and couldn't find them in the cached files."),
    (FailureReason.BAD_OPTION, "│ No such option: --bogus (Possible options: --host)   │"),
    (FailureReason.BAD_OPTION, "│ Invalid value for '--model-timeout': Input should    │"),
    (FailureReason.BAD_OPTION, "ValueError: Unsupported dtype: 'floaty'. Must be 'auto' or a valid torch dtype"),
    (FailureReason.CUDA, "AssertionError: Torch not compiled with CUDA enabled"),
]


def engine_of(kind: EngineKind) -> Engine:
    return build_engine("math", ExpertConfig(model="m", engine=EngineConfig(kind=kind)))


@pytest.mark.parametrize(("reason", "line"), VLLM)
def test_reasons_in_the_log_of_vllm(reason: FailureReason, line: str) -> None:
    signs = engine_of("vllm").signs
    assert classify(1, ["INFO starting", line, *AFTER], signs) == EngineFailure(reason, line.strip())
    if not line.startswith("  "):  # these lines come from the server's own process
        assert classify(1, ["INFO starting", PREFIX + line, *AFTER], signs) == EngineFailure(reason, line)


def test_an_adapter_without_weights_is_told_by_its_folder() -> None:
    """The server's own last line does not contain the path."""
    end = " doesn't contain tensors', please check the stack trace above for the root cause"
    worker, server = f"Worker failed with error '/adapters/math{end}", "Worker failed with error '<path>" + end
    tail = [f"{PREFIX}RuntimeError: {worker}", f"ValueError: Call to add_lora method failed: {server}"]
    assert classify(1, tail, engine_of("vllm").signs) == EngineFailure(FailureReason.WEIGHTS, f"RuntimeError: {worker}")


@pytest.mark.parametrize(("reason", "line"), TRANSFORMERS)
def test_reasons_in_the_log_of_transformers(reason: FailureReason, line: str) -> None:
    tail = ["INFO starting", line, "╰──────────────────────────────────────╯"]
    assert classify(1, tail, engine_of("transformers").signs) == EngineFailure(reason, line.strip("│ "))


@pytest.mark.parametrize("kind", ["vllm", "transformers", "sim"])
@pytest.mark.parametrize("line", ["/usr/bin/python3: No module named vllm", "ModuleNotFoundError: No module named 'x'"])
def test_an_interpreter_without_the_engine(kind: EngineKind, line: str) -> None:
    assert classify(1, ["Traceback", line], engine_of(kind).signs) == EngineFailure(FailureReason.INTERPRETER, line)


def test_a_failed_import_that_was_handled_has_no_meaning() -> None:
    failure = classify(
        1, ["ModuleNotFoundError: No module named 'optional'", "ValueError: why"], engine_of("vllm").signs
    )
    assert failure.reason is FailureReason.CRASHED


@pytest.mark.parametrize(
    ("status", "tail", "reason", "message"),
    [
        (127, ["hpc-router: cannot run /no: none"], FailureReason.INTERPRETER, "hpc-router: cannot run /no: none"),
        (
            137,
            ["CUDA out of memory"],
            FailureReason.KILLED,
            "killed by signal 9: by hand, or by the kernel for lack of memory",
        ),
        (139, ["INFO last"], FailureReason.CRASHED, "ended by signal 11; last line: INFO last"),
        (3, [], FailureReason.CRASHED, "ended with exit status 3; last line: its log is empty"),
        (
            1,
            ["ValueError: why", "a warning"],
            FailureReason.CRASHED,
            "ended with exit status 1; last line: ValueError: why",
        ),
        (1, ["x" * 10_000], FailureReason.CRASHED, "ended with exit status 1; last line: " + "x" * MESSAGE_LENGTH),
    ],
)
def test_without_a_known_log_line_the_exit_status_decides(
    status: int, tail: list[str], reason: FailureReason, message: str
) -> None:
    assert classify(status, tail, engine_of("sim").signs) == EngineFailure(reason, message)


def test_a_handled_exception_is_not_the_cause_of_a_later_end() -> None:
    old = ["Traceback (most recent call last):", '  File "x.py", line 1', "ValueError: a bad request"]
    after = [f"INFO: request {number} served" for number in range(LAST_LINES)]
    signs = engine_of("vllm").signs
    assert classify(143, [*old, *after], signs).message == f"ended by signal 15; last line: {after[-1]}"
    message = classify(1, [*old, *after[: LAST_LINES - 1]], signs).message
    assert message == "ended with exit status 1; last line: ValueError: a bad request"
