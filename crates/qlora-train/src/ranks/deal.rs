//! Which rank computes which micro-batches of a step.

/// The rank of each item, so that ranks get as many items as each other, within one, and sums of sizes that are close: the largest item goes
/// to the rank with the least so far, then the next one (Graham, 1969, bounds on multiprocessing timing anomalies). The same on every
/// rank.
pub(super) fn deal(sizes: &[usize], ranks: usize) -> Vec<usize> {
    let ranks = ranks.max(1);
    let most = sizes.len().div_ceil(ranks);
    // Ranks that may have as many as the others, and one more.
    let mut full = sizes.len() - (most.saturating_sub(1)) * ranks;
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|item| (std::cmp::Reverse(sizes[*item]), *item));
    let mut hands = vec![(0_usize, 0_usize); ranks];
    let mut owners = vec![0; sizes.len()];
    for item in order {
        let open = |items: usize| items + 1 < most || (items + 1 == most && full > 0);
        let free = hands.iter().enumerate().filter(|(_, (_, items))| open(*items));
        let Some((rank, _)) = free.min_by_key(|(rank, (size, items))| (*size, *items, *rank)) else { continue };
        hands[rank].0 += sizes[item];
        hands[rank].1 += 1;
        if hands[rank].1 == most {
            full -= 1;
        }
        owners[item] = rank;
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_as_equal_as_they_can_be() {
        assert_eq!(deal(&[9, 1, 8, 2], 2), [0, 0, 1, 1]);
        assert_eq!(deal(&[5, 5, 5, 5], 2), [0, 1, 0, 1]);
        assert_eq!(deal(&[1, 7, 3], 2), [1, 0, 1]);
        assert_eq!(deal(&[4], 3), [0]);
        assert_eq!(deal(&[], 3), [0; 0]);
        assert_eq!(deal(&[4, 2, 9], 1), [0, 0, 0]);
    }

    proptest! {
        /// Every item is dealt, counts differ by one at most, and no rank has more than the mean and the largest item.
        #[test]
        fn counts_differ_by_one(sizes in prop::collection::vec(0..5000_usize, 0..40), ranks in 1..9_usize) {
            let owners = deal(&sizes, ranks);
            let of = |rank: usize| owners.iter().filter(|owner| **owner == rank).count();
            let counts: Vec<usize> = (0..ranks).map(of).collect();
            prop_assert_eq!(counts.iter().sum::<usize>(), sizes.len());
            let (least, most) = (counts.iter().min().copied(), counts.iter().max().copied());
            prop_assert!(most <= least.map(|least| least + 1), "{:?}", counts);
        }
    }
}
