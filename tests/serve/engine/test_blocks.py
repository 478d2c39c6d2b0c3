"""Blocks are found by content, and users, idle blocks and free ones always add up."""

from __future__ import annotations

import random

from veneer.serve.engine.blocks import BlockPool, next_digest, root_digest


def publish(pool: BlockPool, blocks: list[int], root: bytes, tokens: list[int]) -> None:
    parent = root
    for number in range(len(tokens) // pool.size):
        parent = pool.publish(blocks[number], parent, tokens[number * pool.size : (number + 1) * pool.size])


def test_a_prefix_is_found_by_its_content() -> None:
    """Known blocks are found up to the first difference, and not under another root."""
    pool, root = BlockPool(8, 4), root_digest("a")
    tokens = list(range(12))
    blocks = pool.allocate(3)
    assert blocks is not None
    publish(pool, blocks, root, tokens)
    pool.release(blocks)
    found, digests = pool.match(root, [*tokens[:8], 99, 99, 99, 99])
    assert found == blocks[:2] and digests[0] == next_digest(root, tokens[:4])
    assert pool.match(root_digest("b"), tokens) == ([], [])
    assert pool.match(root, tokens[:3]) == ([], [])
    assert pool.free == 6


def test_equal_tokens_after_another_beginning_are_another_block() -> None:
    """The second block of one text is not the second block of a text that begins otherwise."""
    pool, root = BlockPool(8, 2), root_digest()
    blocks = pool.allocate(2)
    assert blocks is not None
    publish(pool, blocks, root, [1, 2, 3, 4])
    assert pool.match(root, [5, 6, 3, 4])[0] == []


def test_the_block_left_longest_ago_goes_first() -> None:
    """Allocation takes empty blocks, then idle ones in the order in which they were left, a sequence's last ones before its first."""
    pool, root = BlockPool(3, 1), root_digest()
    first, second = pool.allocate(2), pool.allocate(1)
    assert first and second
    publish(pool, first, root, [1, 2])
    publish(pool, second, root, [3])
    pool.release(first)
    pool.release(second)
    assert pool.cached == 3 and pool.allocate(1) == [first[1]]
    assert pool.match(root, [1, 2])[0] == [first[0]] and pool.match(root, [3])[0] == second
    assert pool.allocate(1) is None


def test_blocks_add_up_in_a_random_trace() -> None:
    """After thousands of allocations, hits and releases, no block has two owners by allocation and all come back."""
    draw, pool = random.Random(0), BlockPool(20, 2)
    root, live = root_digest(), []
    for _ in range(3000):
        if live and draw.random() < 0.5:
            pool.release(live.pop(draw.randrange(len(live))))
            continue
        tokens = [draw.randrange(2) for _ in range(2 * draw.randrange(1, 5))]
        blocks, _ = pool.match(root, tokens)
        rest = pool.allocate(len(tokens) // 2 - len(blocks))
        if rest is None:
            pool.release(blocks)
            continue
        assert not set(rest) & {block for other in live for block in other}
        live.append([*blocks, *rest])
        publish(pool, live[-1], root, tokens)
        used = {block for other in live for block in other}
        assert pool.free == pool.count - len(used)
    for blocks in live:
        pool.release(blocks)
    assert pool.free == 20
