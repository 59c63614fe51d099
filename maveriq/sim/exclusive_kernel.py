"""Exclusive engines between two rare events, compiled: arrivals, dispatches, executions, samples of GPUs.

Rare events (an endpoint is added, an engine registers) are Python's, with the controller's own objects; in between
deployments stay as they are, and `replay` does what `Controller` and the simulator do with requests. Its functions
have the names of what they repeat, and the rules are explained there. Every event of SimPy has its counterpart here,
also those that turn out to change nothing, because rules may look at the clock whenever something happens.

`k` is the run: whole numbers, and addresses of tables that Python allocates. Times are in microseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from maveriq import compiling
from maveriq.compiling import (
    FloatPointer,
    Integers,
    Pointer,
    bytes_at,
    compiled,
    floats,
    ints,
    part,
    shorts,
    source_digest,
)
from maveriq.domain.requests import RequestStatus

NEVER = 1 << 62
"""The time of what does not happen."""

ALL_ENDED, DEADLINE, RARE_EVENT, ENGINE_STARTS, UNKNOWN_TIME, IS_FULL = range(6)
"""Why `replay` returns. The first two end the run: every request has ended, or the time is over.
After the others Python does its part and calls it again: a rare event is due and executions that end now have ended;
the GPUs of a deployment that waits to load are idle; `K_ASK_*` is a service time that is not known; a buffer is full.
"""

NEXT_INSTANT, ARRIVALS, DISPATCH, DISPATCHING = range(4)
"""Where `replay` goes on (`K_PHASE`); the last one in the middle of dispatching, after `UNKNOWN_TIME`."""

(
    K_PHASE, K_NOW, K_NEXT_RARE, K_DEADLINE, K_LAST_ENDPOINT,
    K_NEXT_ROW, K_ROWS,  # the next request to arrive, and how many there are; a row is a request's number less 1
    K_WAITING, K_RUNNING, K_REFUSED,  # how many requests wait and run now, and were refused so far
    # Dispatching: settings, the time before which nothing goes, and when the controller wants to be called again.
    K_TICK, K_AFTER_ARRIVAL, K_AFTER_RELEASE, K_CLOSED_UNTIL, K_WAKE, K_LAST_WAKE,
    K_IS_SHARED_ORDER, K_MAX_WAIT,  # of `RequestQueue`
    K_FIRST_WAITING,  # with a shared order: no request before this row waits
    K_ACTIVE, K_ACTIVE_AT,  # deployments that requests wait for, in any order
    K_LATER, K_HELD,  # numbers of the present marks on GPUs
    K_PICK,  # state of the stream that replicas are picked from
    # Events to come: a heap of rows (time, deployment, execution); deployment 0 is a call that the controller wants.
    K_NEXT_CALL,  # the first such call, apart from the heap, which nearly always has no other
    K_EVENTS, K_MAX_EVENTS, K_EVENTS_AT, K_EVENTS_OF_INSTANT,
    K_SAMPLE_US, K_NEXT_SAMPLE, K_SAMPLES, K_MAX_SAMPLES, K_SAMPLES_AT,  # rows: time, then busy time of each GPU
    K_LOG, K_MAX_LOG, K_LOG_AT,  # executions that ended: deployment, start, end
    # Service times: an open hash table with rows (lengths, deployment and batch, first token, last token).
    K_TIMES_AT, K_TIMES_MASK, K_RECORDED_AT,
    K_ASK_DEPLOYMENT, K_ASK_PROMPT, K_ASK_OUTPUT, K_ASK_BATCH,
    # Tables of what there is, see below.
    K_ENDPOINTS_AT, K_REPLICAS_AT, K_DEPLOYMENTS, K_DEPLOYMENTS_AT, K_SHARES_AT, K_GPUS, K_GPUS_AT, K_GPUS_OF_AT,
    K_ON_GPU_AT, K_NODES_AT, K_ON_NODE_AT, K_DELAYS_AT, K_MAX_CO_LOCATED,
    K_TO_START, K_TO_START_AT,  # deployments that wait until their GPUs are idle
    # Columns of requests.
    K_ARRIVAL_AT, K_ENDPOINT_AT, K_PROMPT_AT, K_OUTPUT_AT, K_DEPLOYMENT_AT, K_START_AT, K_FIRST_TOKEN_AT, K_FINISH_AT,
    K_STATUS_AT, K_ATTEMPTS_AT,
    K_BEHIND_AT,  # the row behind each in the queue of its deployment, -1 for none
    K_SIZE,
) = range(71)  # fmt: skip
"""A run."""

E_FIRST, E_REPLICAS, E_SERVES, E_SIZE = range(4)
"""An endpoint: its first replica in `K_REPLICAS_AT`, how many take requests or would refuse them, and which of it."""

(
    D_HEAD, D_TAIL, D_QUEUED, D_ACTIVE,  # rows of its queue, -1 for none; its place among active ones, -1 for none
    D_GPUS, D_GPUS_FROM,  # how many, and the first in `K_GPUS_OF_AT`
    D_BUSY_GPUS,  # how many of these execute now
    D_MAX_BATCH, D_LONGEST,  # requests of a batch; tokens of a request
    D_RUNNING, D_FIRST_ROW, D_EXECUTION, D_STARTED, D_FIRST_TOKEN,  # the batch that it executes
    D_NODE,  # whose process it shares, -1 for none
    D_NODE_PLACE, D_AT, D_FINISH,  # of the execution, see `_SharedExecution`; the place among those of the node
    D_COMPLETED, D_ASSIGNED,
    D_SIZE,
) = range(21)  # fmt: skip
"""A deployment, by its number."""

S_TOKEN, S_LEFT, S_FIRST_LEFT, S_SLOWDOWN, S_SIZE = range(5)
"""What `_SharedExecution` has in floating-point numbers, by deployment."""

G_IS_BUSY, G_STARTED, G_RELEASED, G_BUSY_US, G_LATER, G_HELD, G_ON, G_ON_FROM, G_SIZE = range(9)
"""A GPU: what it executes and has executed, its last marks, and its deployments in `K_ON_GPU_AT`."""

N_RUNNING, N_FROM, N_SIZE = range(3)
"""A node: how many executions share its process, and their place in `K_ON_NODE_AT`."""

EVENT_SIZE, LOG_SIZE, TIMES_SIZE = 3, 3, 4

_WAITING, _RUNNING = RequestStatus.WAITING.value, RequestStatus.RUNNING.value
_COMPLETED, _REFUSED = RequestStatus.COMPLETED.value, RequestStatus.REFUSED.value


@part
def _deployment(k: Pointer, deployment: int) -> Pointer:
    return ints(k[K_DEPLOYMENTS_AT] + 8 * D_SIZE * deployment)


@part
def _share(k: Pointer, deployment: int) -> FloatPointer:
    return floats(k[K_SHARES_AT] + 8 * S_SIZE * deployment)


@part
def _gpu(k: Pointer, gpu: int) -> Pointer:
    return ints(k[K_GPUS_AT] + 8 * G_SIZE * gpu)


# Events to come


@part
def _post(k: Pointer, time_us: int, deployment: int, execution: int) -> None:
    """Add an event."""
    heap, at = ints(k[K_EVENTS_AT]), k[K_EVENTS]
    k[K_EVENTS] += 1
    while at > 0:
        parent = (at - 1) >> 1
        if heap[EVENT_SIZE * parent] <= time_us:
            break
        for field in range(EVENT_SIZE):
            heap[EVENT_SIZE * at + field] = heap[EVENT_SIZE * parent + field]
        at = parent
    heap[EVENT_SIZE * at], heap[EVENT_SIZE * at + 1], heap[EVENT_SIZE * at + 2] = time_us, deployment, execution


@part
def _next_event_us(k: Pointer) -> int:
    return min(k[K_NEXT_CALL], ints(k[K_EVENTS_AT])[0]) if k[K_EVENTS] else k[K_NEXT_CALL]


@part
def _drop_event(k: Pointer) -> None:
    """Remove the first event."""
    heap = ints(k[K_EVENTS_AT])
    k[K_EVENTS] -= 1
    count = k[K_EVENTS]
    last = EVENT_SIZE * count
    time_us, at = heap[last], 0
    while True:
        child = 2 * at + 1
        if child >= count:
            break
        if child + 1 < count and heap[EVENT_SIZE * (child + 1)] < heap[EVENT_SIZE * child]:
            child += 1
        if heap[EVENT_SIZE * child] >= time_us:
            break
        for field in range(EVENT_SIZE):
            heap[EVENT_SIZE * at + field] = heap[EVENT_SIZE * child + field]
        at = child
    for field in range(EVENT_SIZE):
        heap[EVENT_SIZE * at + field] = heap[last + field]


# Contention (`ContentionModel`)


@part
def _advance(k: Pointer, node: Pointer, now_us: int) -> None:
    on_node = ints(k[K_ON_NODE_AT] + 8 * node[N_FROM])
    for place in range(node[N_RUNNING]):
        d, share = _deployment(k, on_node[place]), _share(k, on_node[place])
        done_us = (now_us - d[D_AT]) / share[S_SLOWDOWN]
        share[S_LEFT] -= done_us
        share[S_FIRST_LEFT] -= done_us
        d[D_AT] = now_us


@part
def _reschedule(k: Pointer, node: Pointer) -> None:
    on_node, co_located = ints(k[K_ON_NODE_AT] + 8 * node[N_FROM]), node[N_RUNNING] - 1
    for place in range(node[N_RUNNING]):
        deployment = on_node[place]
        d, share = _deployment(k, deployment), _share(k, deployment)
        before_us = d[D_FINISH]
        if before_us == d[D_AT]:
            continue
        slowdown = 1.0
        if co_located:
            delay_us = floats(k[K_DELAYS_AT])[deployment * k[K_MAX_CO_LOCATED] + co_located]
            slowdown = 1 + delay_us / share[S_TOKEN]
        share[S_SLOWDOWN] = slowdown
        if share[S_FIRST_LEFT] > 0:
            d[D_FIRST_TOKEN] = d[D_AT] + int(np.rint(share[S_FIRST_LEFT] * slowdown))
        d[D_FINISH] = d[D_AT] + max(1, int(np.rint(share[S_LEFT] * slowdown)))
        if d[D_FINISH] != before_us:
            _post(k, d[D_FINISH], deployment, d[D_EXECUTION])


@part
def _enter(k: Pointer, deployment: int, service_us: int, tokens: int) -> None:
    """Start an execution that shares a process."""
    d, share, now_us = _deployment(k, deployment), _share(k, deployment), k[K_NOW]
    node = ints(k[K_NODES_AT] + 8 * N_SIZE * d[D_NODE])
    _advance(k, node, now_us)
    d[D_NODE_PLACE] = node[N_RUNNING]
    ints(k[K_ON_NODE_AT] + 8 * node[N_FROM])[node[N_RUNNING]] = deployment
    node[N_RUNNING] += 1
    share[S_TOKEN], share[S_LEFT], share[S_FIRST_LEFT] = service_us / tokens, service_us, d[D_FIRST_TOKEN] - now_us
    share[S_SLOWDOWN] = 1.0
    d[D_AT], d[D_FINISH] = now_us, -1
    _reschedule(k, node)


@part
def _leave(k: Pointer, deployment: int) -> None:
    """End an execution that shares a process."""
    d = _deployment(k, deployment)
    node = ints(k[K_NODES_AT] + 8 * N_SIZE * d[D_NODE])
    _advance(k, node, k[K_NOW])
    on_node = ints(k[K_ON_NODE_AT] + 8 * node[N_FROM])
    node[N_RUNNING] -= 1
    last = on_node[node[N_RUNNING]]
    on_node[d[D_NODE_PLACE]] = last
    _deployment(k, last)[D_NODE_PLACE] = d[D_NODE_PLACE]
    _reschedule(k, node)


# Executions


@part
def _set_busy(k: Pointer, gpu: int, change: int) -> None:
    """Let a GPU execute (1) or not any more (-1)."""
    g = _gpu(k, gpu)
    g[G_IS_BUSY] += change
    on_gpu = ints(k[K_ON_GPU_AT] + 8 * g[G_ON_FROM])
    for place in range(g[G_ON]):
        _deployment(k, on_gpu[place])[D_BUSY_GPUS] += change


@part
def _end_execution(k: Pointer, deployment: int, execution: int) -> None:
    """End an execution at its time; nothing happens if it ended before, or ends at another time."""
    d, now_us = _deployment(k, deployment), k[K_NOW]
    if d[D_RUNNING] == 0 or d[D_EXECUTION] != execution:
        return
    if d[D_NODE] >= 0:
        if d[D_FINISH] != now_us:
            return
        _leave(k, deployment)
    row = d[D_FIRST_ROW]
    for _ in range(d[D_RUNNING]):
        bytes_at(k[K_STATUS_AT])[row] = _COMPLETED
        ints(k[K_FIRST_TOKEN_AT])[row] = d[D_FIRST_TOKEN]
        ints(k[K_FINISH_AT])[row] = now_us
        row = shorts(k[K_BEHIND_AT])[row]
    k[K_RUNNING] -= d[D_RUNNING]
    d[D_COMPLETED] += d[D_RUNNING]
    d[D_RUNNING] = 0
    gpus = ints(k[K_GPUS_OF_AT] + 8 * d[D_GPUS_FROM])
    for place in range(d[D_GPUS]):
        g = _gpu(k, gpus[place])
        _set_busy(k, gpus[place], -1)
        g[G_RELEASED] = now_us
        g[G_BUSY_US] += now_us - d[D_STARTED]
    log = ints(k[K_LOG_AT] + 8 * LOG_SIZE * k[K_LOG])
    log[0], log[1], log[2] = deployment, d[D_STARTED], now_us
    k[K_LOG] += 1


_MIX_LENGTHS, _MIX_WHICH = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9


def places_of(lengths: Integers, which: Integers) -> Integers:
    """Return where the search for service times starts, before it is cut to the size of the table."""
    mixed = (lengths * _MIX_LENGTHS) ^ (which * _MIX_WHICH)
    return mixed ^ mixed >> 29


@part
def _find_times(k: Pointer, deployment: int, prompt_tokens: int, output_tokens: int, batch: int) -> int:
    """Return the address of the times of a batch, 0 if they are not known."""
    lengths, which = output_tokens << 32 | prompt_tokens, deployment << 32 | batch
    mixed = (lengths * _MIX_LENGTHS) ^ (which * _MIX_WHICH)  # as `places_of` does
    place = (mixed ^ mixed >> 29) & k[K_TIMES_MASK]
    while True:
        at = k[K_TIMES_AT] + 8 * TIMES_SIZE * place
        entry = ints(at)
        if entry[1] == 0:
            k[K_ASK_DEPLOYMENT], k[K_ASK_BATCH] = deployment, batch
            k[K_ASK_PROMPT], k[K_ASK_OUTPUT] = prompt_tokens, output_tokens
            return 0
        if entry[0] == lengths and entry[1] == which:
            return at + 16
        place = (place + 1) & k[K_TIMES_MASK]


@part
def _start_execution(k: Pointer, deployment: int) -> bool:
    """Execute the first requests of a deployment's queue; return False if their service time is not known."""
    d, now_us = _deployment(k, deployment), k[K_NOW]
    batch, row = min(d[D_MAX_BATCH], d[D_QUEUED]), d[D_HEAD]
    prompt_tokens = output_tokens = recorded_us = 0
    for _ in range(batch):
        prompt_tokens = max(prompt_tokens, shorts(k[K_PROMPT_AT])[row])
        output_tokens = max(output_tokens, shorts(k[K_OUTPUT_AT])[row])
        if k[K_RECORDED_AT]:
            recorded_us = max(recorded_us, ints(k[K_RECORDED_AT])[row])
        row = shorts(k[K_BEHIND_AT])[row]
    first_us = service_us = recorded_us
    if not k[K_RECORDED_AT]:
        at = _find_times(k, deployment, prompt_tokens, output_tokens, batch)
        if at == 0:
            return False
        first_us, service_us = ints(at)[0], ints(at)[1]
    d[D_RUNNING], d[D_FIRST_ROW], d[D_STARTED] = batch, d[D_HEAD], now_us
    d[D_EXECUTION] += 1
    row = d[D_HEAD]
    for _ in range(batch):
        bytes_at(k[K_STATUS_AT])[row] = _RUNNING
        bytes_at(k[K_ATTEMPTS_AT])[row] += 1
        ints(k[K_START_AT])[row] = now_us
        row = shorts(k[K_BEHIND_AT])[row]
    d[D_HEAD] = row
    d[D_QUEUED] -= batch
    if d[D_QUEUED] == 0:
        _deactivate(k, d)
    k[K_WAITING] -= batch
    k[K_RUNNING] += batch
    gpus = ints(k[K_GPUS_OF_AT] + 8 * d[D_GPUS_FROM])
    for place in range(d[D_GPUS]):
        _set_busy(k, gpus[place], 1)
        _gpu(k, gpus[place])[G_STARTED] = now_us
    if k[K_TICK]:
        k[K_CLOSED_UNTIL] = (now_us // k[K_TICK] + 1) * k[K_TICK]
    d[D_FIRST_TOKEN] = now_us + first_us
    if d[D_NODE] >= 0:
        _enter(k, deployment, service_us, output_tokens)
    else:
        _post(k, now_us + service_us, deployment, d[D_EXECUTION])
    return True


# Arrivals and queues


@part
def _deactivate(k: Pointer, d: Pointer) -> None:
    """Record that nothing waits for a deployment."""
    active = ints(k[K_ACTIVE_AT])
    k[K_ACTIVE] -= 1
    last = active[k[K_ACTIVE]]
    active[d[D_ACTIVE]] = last
    _deployment(k, last)[D_ACTIVE] = d[D_ACTIVE]
    d[D_ACTIVE] = d[D_HEAD] = d[D_TAIL] = -1


@part
def _pick(k: Pointer, row: int, choices: int) -> int:
    """Return the replica of a request (`maveriq.streams.pick`)."""
    state = np.uint64(k[K_PICK]) + np.uint64(row + 1) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((state ^ (state >> np.uint64(31))) % np.uint64(choices))


@part
def _arrive(k: Pointer, row: int) -> None:
    """Queue a request, or refuse it; Python adds the reason."""
    endpoint = ints(k[K_ENDPOINTS_AT] + 8 * E_SIZE * shorts(k[K_ENDPOINT_AT])[row])
    replicas, serves, deployment = endpoint[E_REPLICAS], endpoint[E_SERVES], 0
    if replicas > 0:
        place = endpoint[E_FIRST]
        if replicas > 1:
            place += _pick(k, row, replicas)
        deployment = ints(k[K_REPLICAS_AT])[place]
        shorts(k[K_DEPLOYMENT_AT])[row] = deployment
    d = _deployment(k, deployment)
    tokens = shorts(k[K_PROMPT_AT])[row] + shorts(k[K_OUTPUT_AT])[row]
    if not serves or tokens > d[D_LONGEST]:
        bytes_at(k[K_STATUS_AT])[row] = _REFUSED
        k[K_REFUSED] += 1
        return
    shorts(k[K_BEHIND_AT])[row] = -1
    if d[D_QUEUED] == 0:
        d[D_HEAD] = row
        d[D_ACTIVE] = k[K_ACTIVE]
        ints(k[K_ACTIVE_AT])[k[K_ACTIVE]] = deployment
        k[K_ACTIVE] += 1
    else:
        shorts(k[K_BEHIND_AT])[d[D_TAIL]] = row
    d[D_TAIL] = row
    d[D_QUEUED] += 1
    d[D_ASSIGNED] += 1
    k[K_WAITING] += 1


@part
def _is_marked(k: Pointer, d: Pointer, field: int, mark: int) -> bool:
    gpus = ints(k[K_GPUS_OF_AT] + 8 * d[D_GPUS_FROM])
    for place in range(d[D_GPUS]):  # noqa: SIM110 - numba has no `any`
        if _gpu(k, gpus[place])[field] == mark:
            return True
    return False


@part
def _mark(k: Pointer, d: Pointer, field: int, mark: int) -> None:
    gpus = ints(k[K_GPUS_OF_AT] + 8 * d[D_GPUS_FROM])
    for place in range(d[D_GPUS]):
        _gpu(k, gpus[place])[field] = mark


@part
def _is_blocked(k: Pointer, d: Pointer) -> bool:
    """Return whether a GPU of a deployment executes, or waits for a request that goes later."""
    return d[D_BUSY_GPUS] > 0 or _is_marked(k, d, G_LATER, k[K_LATER])


@part
def _first_of_all(k: Pointer) -> int:
    """Return the deployment of the first waiting request, 0 if that is blocked; one does wait."""
    status, row = bytes_at(k[K_STATUS_AT]), k[K_FIRST_WAITING]
    while status[row] != _WAITING:
        row += 1
    k[K_FIRST_WAITING] = row
    deployment = shorts(k[K_DEPLOYMENT_AT])[row]
    return 0 if _is_blocked(k, _deployment(k, deployment)) else deployment


@part
def _overdue(k: Pointer) -> int:
    """Return the deployment of the first overdue request that can go, 0 if there is none; mark GPUs held for others."""
    active, latest_us, last = ints(k[K_ACTIVE_AT]), k[K_NOW] - k[K_MAX_WAIT], -1
    while True:
        best, found = NEVER, 0
        for place in range(k[K_ACTIVE]):
            head = _deployment(k, active[place])[D_HEAD]
            if last < head < best and ints(k[K_ARRIVAL_AT])[head] < latest_us:
                best, found = head, active[place]
        if found == 0:
            return 0
        d = _deployment(k, found)
        if not _is_blocked(k, d) and not _is_marked(k, d, G_HELD, k[K_HELD]):
            return found
        _mark(k, d, G_HELD, k[K_HELD])
        last = best


@part
def _first_of_each(k: Pointer) -> int:
    """Return the deployment whose first request goes next where each has its own order, 0 if all are blocked."""
    k[K_HELD] += 1
    overdue = _overdue(k)
    if overdue:
        return overdue
    active, best, found = ints(k[K_ACTIVE_AT]), NEVER, 0
    for place in range(k[K_ACTIVE]):
        d = _deployment(k, active[place])
        if d[D_HEAD] < best and not _is_blocked(k, d) and not _is_marked(k, d, G_HELD, k[K_HELD]):
            best, found = d[D_HEAD], active[place]
    return found


@part
def _earliest_us(k: Pointer, d: Pointer) -> int:
    """Return when the first request of a deployment may go (`DispatchDelays`)."""
    gpus, released_us = ints(k[K_GPUS_OF_AT] + 8 * d[D_GPUS_FROM]), 0
    for place in range(d[D_GPUS]):
        released_us = max(released_us, _gpu(k, gpus[place])[G_RELEASED])
    ready_us = max(ints(k[K_ARRIVAL_AT])[d[D_HEAD]] + k[K_AFTER_ARRIVAL], released_us + k[K_AFTER_RELEASE])
    ready_us = max(ready_us, k[K_CLOSED_UNTIL])
    tick_us = k[K_TICK]
    return (ready_us + tick_us - 1) // tick_us * tick_us if tick_us else ready_us


@part
def _dispatch(k: Pointer) -> bool:
    """Dispatch what may go now; return False if a service time is not known."""
    while k[K_WAITING] > 0:
        deployment = _first_of_all(k) if k[K_IS_SHARED_ORDER] else _first_of_each(k)
        if deployment == 0:
            break
        d = _deployment(k, deployment)
        go_us = _earliest_us(k, d)
        if go_us > k[K_NOW]:
            k[K_WAKE] = min(k[K_WAKE], go_us)
            _mark(k, d, G_LATER, k[K_LATER])
        elif not _start_execution(k, deployment):
            return False
    return True


# The run


@part
def _sample(k: Pointer) -> None:
    row = ints(k[K_SAMPLES_AT] + 8 * (1 + k[K_GPUS]) * k[K_SAMPLES])
    k[K_SAMPLES] += 1
    row[0] = k[K_NOW]
    for gpu in range(k[K_GPUS]):
        g = _gpu(k, gpu)
        row[1 + gpu] = g[G_BUSY_US] + (k[K_NOW] - g[G_STARTED] if g[G_IS_BUSY] else 0)


@part
def _is_full(k: Pointer) -> bool:
    """Return whether a buffer may not hold what happens in an instant."""
    return (
        k[K_EVENTS] + k[K_EVENTS_OF_INSTANT] > k[K_MAX_EVENTS]
        or k[K_SAMPLES] >= k[K_MAX_SAMPLES]
        or k[K_LOG] + k[K_DEPLOYMENTS] > k[K_MAX_LOG]
    )


@part
def _begin_instant(k: Pointer) -> int:
    """Go to the next instant and end the executions that end then; return -1, or why `replay` returns."""
    arrival_us = ints(k[K_ARRIVAL_AT])[k[K_NEXT_ROW]] if k[K_NEXT_ROW] < k[K_ROWS] else NEVER
    now_us = min(_next_event_us(k), arrival_us, k[K_NEXT_RARE], k[K_NEXT_SAMPLE])
    if now_us > k[K_DEADLINE]:
        return DEADLINE
    if _is_full(k):
        return IS_FULL
    k[K_NOW] = now_us
    if now_us == k[K_NEXT_SAMPLE]:
        _sample(k)
        k[K_NEXT_SAMPLE] += k[K_SAMPLE_US]
    if k[K_NEXT_CALL] == now_us:
        k[K_NEXT_CALL] = NEVER
    heap = ints(k[K_EVENTS_AT])
    while k[K_EVENTS] and heap[0] == now_us:
        deployment, execution = heap[1], heap[2]
        _drop_event(k)
        if deployment:
            _end_execution(k, deployment, execution)
    k[K_PHASE] = ARRIVALS
    return RARE_EVENT if now_us == k[K_NEXT_RARE] else -1


@part
def _take_arrivals(k: Pointer) -> int:
    """Take the requests that arrive now; return -1, or why `replay` returns."""
    row, arrival_us = k[K_NEXT_ROW], ints(k[K_ARRIVAL_AT])
    while row < k[K_ROWS] and arrival_us[row] == k[K_NOW]:
        _arrive(k, row)
        row += 1
    k[K_NEXT_ROW], k[K_PHASE] = row, DISPATCH
    to_start = ints(k[K_TO_START_AT])
    for place in range(k[K_TO_START]):
        if _deployment(k, to_start[place])[D_BUSY_GPUS] == 0:
            return ENGINE_STARTS
    return -1


@part
def _end_instant(k: Pointer) -> int:
    """Dispatch, and note when the controller wants to be called; return -1, or why `replay` returns."""
    if k[K_PHASE] == DISPATCH:
        k[K_WAKE] = NEVER
        k[K_LATER] += 1
    k[K_PHASE] = DISPATCHING
    if not _dispatch(k):
        return UNKNOWN_TIME
    if k[K_WAKE] != NEVER and k[K_WAKE] != k[K_LAST_WAKE]:
        k[K_LAST_WAKE] = k[K_WAKE]
        if k[K_NEXT_CALL] == NEVER:
            k[K_NEXT_CALL] = k[K_WAKE]
        else:
            _post(k, k[K_WAKE], 0, 0)
    k[K_PHASE] = NEXT_INSTANT
    still_open = k[K_NEXT_ROW] < k[K_ROWS] or k[K_WAITING] > 0 or k[K_RUNNING] > 0
    return ALL_ENDED if not still_open and k[K_NOW] >= k[K_LAST_ENDPOINT] else -1


def _entry(sources: int) -> Callable[[int], int]:
    """Return the compiled function for sources with a digest, which must be a constant of it (`maveriq.compiling`)."""

    def replay(at: int) -> int:
        """Go on with the run at an address until Python has something to do, and return what."""
        k, outcome = ints(at), 0 * sources - 1
        while outcome < 0:
            if k[K_PHASE] == NEXT_INSTANT:
                outcome = _begin_instant(k)
            elif k[K_PHASE] == ARRIVALS:
                outcome = _take_arrivals(k)
            else:
                outcome = _end_instant(k)
        return outcome

    return compiled(replay)


replay = _entry(source_digest(compiling))
