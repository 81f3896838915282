from speechllm.data.prefix import common_prefix


def test_the_longest_with_which_all_begin() -> None:
    assert common_prefix([(1, 2, 3), (1, 2, 4), (1, 2)]) == (1, 2)
    assert common_prefix([(1, 2, 3)]) == (1, 2, 3)
    assert common_prefix([(1, 2), ()]) == ()
    assert common_prefix([(1, 2), (3, 2)]) == ()
