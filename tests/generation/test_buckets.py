from jaxft.generation.buckets import bucket, power_of_two


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 65, 97, 129)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 96, 128, 192,
    ]  # fmt: skip
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(n <= size for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) < 20
    assert all(size < 1.5 * n for n, size in enumerate(sizes, 1) if n > 16)


def test_power_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 32, 33)] == [1, 2, 4, 4, 8, 32, 64]
