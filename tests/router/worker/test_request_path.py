"""How many files of the package a warm request enters, and how often it moves between them: the measure of how long its
path is to read. docs/architecture.md lists these files."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import hpc_router
from hpc_router.config.schema import Deployment
from hpc_router.relay.downstream.connection import ClientConnection
from hpc_router.relay.downstream.server import Server
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.relay.upstream.connection import Connection
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.router.replicas.replica import Event, Replica
from hpc_router.router.worker.control_client import ControlClient
from hpc_router.router.worker.dispatcher import Dispatcher, stream_timeouts_of
from hpc_router.router.worker.gateway import Gateway
from hpc_router.router.worker.process import control_client
from hpc_router.router.worker.route_request import RequestRouting
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.policy import ClassifierPolicy
from hpc_router.state.registry import Record, RecordKind, State
from tests.router.fakes import a_deployment, event
from tests.routing.support import an_artefact

PACKAGE = str(Path(hpc_router.__file__).parent) + "/"
BODY = b'{"choices": []}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Path_:
    """Files entered by calls, and moves between files by calls and returns."""
