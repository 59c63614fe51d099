"""Laws of the routing policies, on replicas that only count."""

from collections import Counter
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from maveriq.control.routing_policies import PrefixAware, RoutingPolicy, RoutingRule, routing_policy
from maveriq.domain.requests import Request

KV_TOKENS = 4_096


@dataclass
class Counting:
    """A replica that holds requests until they are ended."""

    deployment_id: int
    generation: int = 1
    assigned: int = 0
    kv_capacity_tokens: int = KV_TOKENS
    held: dict[int, Request] = field(default_factory=dict)

    @property
    def outstanding(self) -> int:
        return len(self.held)

    @property
    def kv_tokens(self) -> int:
        return sum(each.prompt_tokens for each in self.held.values())


def request(number: int, *, prompt_tokens: int = 64, prompt_id: int = 0, session_id: int = 0) -> Request:
    return Request(
        request_id=number,
        endpoint_id=1,
        arrival_us=number,
        prompt_tokens=prompt_tokens,
        output_tokens=1,
        prompt_id=prompt_id,
        session_id=session_id,
    )


def replicas(count: int) -> list[Counting]:
    return [Counting(number) for number in range(1, count + 1)]


def send(policy: RoutingPolicy, ready: list[Counting], asked: Request) -> Counting:
    chosen = policy.choose(ready, asked)
    policy.sent(chosen, asked, asked.arrival_us, 1_000)
    chosen.held[asked.request_id] = asked
    chosen.assigned += 1
    return chosen


@st.composite
def scripts(draw):
    """Requests, each with the replicas that are up, and how many of the requests before have ended."""
    count = draw(st.integers(1, 5))
    steps = st.tuples(
        st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted),
        st.integers(1, 300),  # prompt tokens
        st.integers(0, 3),  # prompt
        st.integers(0, 3),  # session
        st.booleans(),  # whether the oldest request ends first
    )
    return count, draw(st.lists(steps, min_size=1, max_size=40))


def route(rule: RoutingRule, script) -> list[tuple[list[Counting], Counting, list[int]]]:
    """Return for each request the replicas that were up, the chosen one, and what each had outstanding."""
    count, steps = script
    all_replicas, policy, routed = replicas(count), routing_policy(rule, 42), []
    for number, (up, tokens, prompt, session, ends) in enumerate(steps, start=1):
        if ends:
            for replica in all_replicas:
                replica.held.pop(min(replica.held, default=0), None)
        ready = [all_replicas[index] for index in up]
        outstanding = [replica.outstanding for replica in ready]
        asked = request(number, prompt_tokens=tokens, prompt_id=prompt, session_id=session)
        routed.append((ready, send(policy, ready, asked), outstanding))
    return routed


@pytest.mark.parametrize("rule", RoutingRule)
@settings(max_examples=30)
@given(scripts())
def test_each_request_goes_to_one_replica_that_is_ready_and_equal_runs_route_alike(rule, script):
    routed = route(rule, script)
    assert all(chosen in ready for ready, chosen, _ in routed)
    assert [each.deployment_id for _, each, _ in routed] == [each.deployment_id for _, each, _ in route(rule, script)]


@settings(max_examples=50)
@given(scripts())
def test_least_outstanding_never_passes_over_a_replica_with_fewer(script):
    for ready, chosen, outstanding in route(RoutingRule.LEAST_OUTSTANDING, script):
        assert outstanding[ready.index(chosen)] == min(outstanding)


@pytest.mark.parametrize("rule", [RoutingRule.ROUND_ROBIN, RoutingRule.LEAST_OUTSTANDING, RoutingRule.LEAST_KV])
def test_equal_requests_are_spread_evenly(rule):
    ready, policy = replicas(7), routing_policy(rule, 1)
    for number in range(1, 101):
        send(policy, ready, request(number))
        counts = [replica.assigned for replica in ready]
        assert max(counts) - min(counts) <= 1


def test_least_outstanding_takes_turns_among_idle_replicas():
    ready, policy = replicas(3), routing_policy(RoutingRule.LEAST_OUTSTANDING, 1)
    for number in range(1, 10):
        send(policy, ready, request(number)).held.clear()
    assert [replica.assigned for replica in ready] == [3, 3, 3]


def test_round_robin_goes_on_where_a_replica_is_gone_or_back():
    ready, policy = replicas(3), routing_policy(RoutingRule.ROUND_ROBIN, 1)
    chosen = [send(policy, ready, request(1)), send(policy, ready, request(2))]
    chosen += [send(policy, ready[:2], request(3)), send(policy, ready, request(4)), send(policy, ready, request(5))]
    assert [replica.deployment_id for replica in chosen] == [1, 2, 1, 2, 3]


def test_random_choices_are_even_and_depend_on_seed_and_number_alone():
    def chosen(seed: int, numbers: range) -> list[int]:
        policy = routing_policy(RoutingRule.RANDOM, seed)
        return [policy.choose(replicas(4), request(number)).deployment_id for number in numbers]

    counts = Counter(chosen(3, range(1, 4_001)))
    assert all(abs(count - 1_000) < 100 for count in counts.values())
    assert chosen(3, range(50, 100)) == chosen(3, range(1, 100))[49:]
    assert chosen(3, range(1, 50)) != chosen(4, range(1, 50))


def most_loaded(rule: RoutingRule, *, seed: int, count: int = 64) -> int:
    """Return the most requests that one of `count` replicas gets of as many."""
    ready, policy = replicas(count), routing_policy(rule, seed)
    for number in range(1, count + 1):
        send(policy, ready, request(number))
    return max(replica.outstanding for replica in ready)


def test_two_choices_beat_one():
    """Of n requests to n replicas the fullest gets about ln n / ln ln n at random, about log2 ln n of two choices."""
    seeds = range(20)
    two = [most_loaded(RoutingRule.POWER_OF_TWO, seed=seed) for seed in seeds]
    one = [most_loaded(RoutingRule.RANDOM, seed=seed) for seed in seeds]
    assert max(two) <= min(one)
    assert sum(one) > 1.4 * sum(two)


def test_least_kv_counts_the_share_of_each_cache():
    small, large = Counting(1, kv_capacity_tokens=1_000), Counting(2, kv_capacity_tokens=10_000)
    policy = routing_policy(RoutingRule.LEAST_KV, 1)
    for number in range(1, 111):
        send(policy, [small, large], request(number, prompt_tokens=50))
    assert large.kv_tokens == pytest.approx(10 * small.kv_tokens, rel=0.1)


def test_a_prompt_goes_where_its_prefix_is_unless_that_replica_has_much_more_to_do():
    ready, policy = replicas(3), routing_policy(RoutingRule.PREFIX_AWARE, 1)
    first = send(policy, ready, request(1, prompt_tokens=320, prompt_id=1))
    first.held.clear()
    assert send(policy, ready, request(2, prompt_tokens=320, prompt_id=1)) is first
    assert send(policy, ready, request(3, prompt_tokens=320, prompt_id=2)) is not first
    first.held[9] = request(9, prompt_tokens=5_000)
    spread = send(policy, ready, request(4, prompt_tokens=320, prompt_id=1))
    assert spread is not first
    spread.held.clear()
    assert send(policy, ready, request(5, prompt_tokens=320, prompt_id=1)) is spread


def test_a_longer_common_prefix_counts_more():
    ready, policy = replicas(2), PrefixAware()
    for number, hashes in enumerate(((1, 2, 3), (1, 2, 4, 5)), start=1):
        asked = request(number, prompt_tokens=16 * len(hashes))
        asked.prefix_hashes, asked.prefix_hash_tokens = hashes, 16
        policy.sent(ready[number - 1], asked, 0, 0)
    asked = request(3, prompt_tokens=80)
    asked.prefix_hashes, asked.prefix_hash_tokens = (1, 2, 4, 5, 6), 16
    assert policy.choose(ready, asked) is ready[1]


def test_what_a_cache_no_longer_holds_is_forgotten_and_so_is_all_when_the_engine_restarts():
    [one, two], policy = replicas(2), PrefixAware()
    for number in range(1, 11):  # 10 x 512 tokens, where there is room for 4,096
        policy.sent(one, request(number, prompt_tokens=512, prompt_id=number), 0, 0)
    two.held[99] = request(99, prompt_tokens=100)  # so that it is chosen only for what the other lacks
    one.held[98] = request(98, prompt_tokens=200)
    assert policy.choose([one, two], request(11, prompt_tokens=512, prompt_id=9)) is one
    assert policy.choose([one, two], request(10, prompt_tokens=512, prompt_id=1)) is two
    one.generation += 1
    assert policy.choose([one, two], request(12, prompt_tokens=512, prompt_id=9)) is two


def test_when_a_replica_goes_only_its_own_sessions_move():
    ready, policy = replicas(5), routing_policy(RoutingRule.SESSION, 1)
    before = {session: policy.choose(ready, request(1, session_id=session)) for session in range(1, 400)}
    gone, left = ready[2], [*ready[:2], *ready[3:]]
    for session, replica in before.items():
        after = policy.choose(left, request(2, session_id=session))
        assert after is replica or replica is gone
    counts = Counter(each.deployment_id for each in before.values())
    assert all(50 < counts[replica.deployment_id] < 110 for replica in ready)
