//! Batches: padding, order, and resuming anywhere.

#[path = "../../adapter-io/tests/bounded/mod.rs"]
mod bounded;

use bounded::bounded;
use proptest::prelude::*;
use qlora_data::{
    Batch, BatchOrder, DataConfig, Example, Examples, MASKED_LABEL, Packing, Padding, Position, SourceWeight,
};

fn config() -> DataConfig {
    DataConfig::default()
}

fn example(line: usize, length: usize) -> Example {
    let ids = || (0..length as u32).map(|i| line as u32 * 1000 + i);
    Example { input_ids: ids().collect(), labels: ids().map(i64::from).collect(), line }
}

fn rows(order: &BatchOrder, epoch: usize) -> Vec<Vec<usize>> {
    order.rows(epoch).collect()
}

#[test]
fn batches_are_padded_on_the_right() {
    let batch = Batch::new(&[example(1, 2), example(2, 3)], 9);
    assert_eq!((batch.rows, batch.cols), (2, 3));
    assert_eq!(batch.input_ids, [1000, 1001, 9, 2000, 2001, 2002]);
    assert_eq!(batch.labels, [1000, 1001, MASKED_LABEL, 2000, 2001, 2002]);
    assert_eq!(batch.lengths, [2, 3]);
    assert_eq!(batch.label_tokens(), 3);
}

#[test]
fn packed_rows_lie_end_to_end() {
    let batch = Batch::end_to_end(&[example(1, 2), example(2, 3), example(3, 1)]);
    assert_eq!((batch.rows, batch.cols, batch.packed), (3, 3, true));
    assert_eq!(batch.input_ids, [1000, 1001, 2000, 2001, 2002, 3000]);
    assert_eq!(batch.labels, [1000, 1001, 2000, 2001, 2002, 3000]);
    assert_eq!(batch.spans().collect::<Vec<_>>(), [0..2, 2..5, 5..6]);
    // Nothing predicts the first token of a row, wherever it lies.
    assert_eq!(batch.label_tokens(), 3);
    assert_eq!(batch.padding(), Padding { tokens: 6, cells: 6 });
    let padded = Batch::new(&[example(1, 2), example(2, 3)], 9);
    assert_eq!(padded.spans().collect::<Vec<_>>(), [0..3, 3..6]);
    assert_eq!(padded.padding(), Padding { tokens: 5, cells: 6 });
}

#[test]
fn the_order_is_written_in_stone() {
    // A change of this order would break the resumption of every run that was started before it.
    let examples: Examples = (0..8).map(|line| example(line, 1)).collect();
    let order = BatchOrder::new(&examples, &config(), 3, 42, 0);
    let first = rows(&order, 0);
    assert_eq!(first.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 2]);
    assert_eq!(first.concat(), ORDER_OF_EPOCH_0);
    assert_ne!(rows(&order, 1).concat(), first.concat());
    let plain = BatchOrder::in_file_order(&examples, 3, 0);
    assert_eq!(rows(&plain, 5).concat(), [0, 1, 2, 3, 4, 5, 6, 7]);
}

/// Sequences of up to ten tokens, two of them a batch.
#[test]
fn the_order_of_packed_rows_is_written_in_stone() {
    let examples: Examples = [5, 2, 7, 3, 2, 4, 4, 2, 9].into_iter().enumerate().map(|(i, n)| example(i, n)).collect();
    let packed = DataConfig { packing: Packing::Auto, max_length: 10, ..config() };
    let order = BatchOrder::new(&examples, &packed, 2, 42, 0);
    assert_eq!((order.sequences(), order.batches_per_epoch()), (4, 2));
    assert_eq!(rows(&order, 0), PACKED_EPOCH_0);
    assert_ne!(rows(&order, 1), rows(&order, 0));
    // For evaluation: sequences in the order of their first rows.
    let order = BatchOrder::for_evaluation(&examples, &packed, 2, 0);
    assert_eq!(rows(&order, 0), [[0, 5, 1, 4, 6, 7].to_vec(), [2, 3, 8].to_vec()]);
    assert_eq!(rows(&order, 0), rows(&order, 3));
    let batch = order.epoch(&examples, 0).next().unwrap();
    assert_eq!((batch.packed, batch.lengths), (true, vec![5, 4, 2, 2, 4, 2]));
}

/// Rows of the first source are packed twice. A source of which an epoch visits a part would have other sequences in each.
#[test]
fn weighted_rows_are_packed_where_epochs_are_alike() {
    let examples: Examples = [5, 2, 7, 3, 4].into_iter().enumerate().map(|(i, n)| example(i, n)).collect();
    let packed = DataConfig { packing: Packing::Auto, max_length: 10, ..config() };
    let weighted = |first| {
        let order = BatchOrder::new(&examples, &packed, 2, 42, 0);
        order.weighted(&[SourceWeight { rows: 2, weight: first }, SourceWeight { rows: 3, weight: 1.0 }])
    };
    let order = weighted(2.0).unwrap();
    // 5, 2, 5, 2, 7, 3 and 4 tokens.
    assert_eq!((order.rows_per_epoch(), order.sequences(), order.padding(0).tokens), (7, 3, 28));
    for epoch in 0..3 {
        let mut rows = rows(&order, epoch).concat();
        rows.sort_unstable();
        assert_eq!(rows, [0, 0, 1, 1, 2, 3, 4]);
        assert_eq!(order.rows(epoch).len(), order.batches_per_epoch());
    }
    let error = weighted(0.5).unwrap_err().to_string();
    assert!(error.contains("weight 0.5") && error.contains("data.packing"), "{error}");
}

const PACKED_EPOCH_0: [&[usize]; 2] = [&[5, 7, 1, 4, 0, 6], &[8, 2, 3]];

/// 8,000 rows of 50 to 400 tokens: what is lost to half-filled sequences, and to padding.
#[test]
fn packing_fills_sequences() {
    let examples: Examples = (0..8000).map(|i| example(i, 50 + (i * i * 7919) % 351)).collect();
    let of = |packing| BatchOrder::new(&examples, &DataConfig { packing, ..config() }, 4, 1, 0);
    let (packed, padded) = (of(Packing::Auto), of(Packing::Off));
    let fill = packed.packed().unwrap().fill();
    assert!(fill > 0.995, "{fill}");
    assert!(packed.padding(0).waste() == 0.0 && padded.padding(0).waste() > 0.2);
    let batch = packed.epoch(&examples, 0).next().unwrap();
    // Hardly any place of four sequences is left.
    assert!((4 * 2020..=4 * 2048).contains(&batch.input_ids.len()), "{}", batch.input_ids.len());
    // Of the same number of sequences in every epoch.
    for epoch in 0..3 {
        assert_eq!(packed.rows(epoch).len(), packed.batches_per_epoch());
    }
}

const ORDER_OF_EPOCH_0: [usize; 8] = [6, 0, 5, 3, 7, 2, 1, 4];

#[test]
fn grouping_by_length_saves_padding() {
    let examples: Examples = (0..1000).map(|i| example(i, 1 + (i * 7919) % 500)).collect();
    let grouped = DataConfig { group_by_length: true, ..config() };
    let cells = |config: &DataConfig| -> usize {
        let order = BatchOrder::new(&examples, config, 4, 1, 0);
        order.epoch(&examples, 0).map(|b| b.rows * b.cols).sum()
    };
    let tokens: usize = examples.lengths().sum();
    for config in [&grouped, &config()] {
        let padding = BatchOrder::new(&examples, config, 4, 1, 0).padding(0);
        assert_eq!((padding.tokens, padding.cells), (tokens as u64, cells(config) as u64));
        // Two roundings of numbers below 1.
        assert!((padding.waste() - (1.0 - tokens as f64 / cells(config) as f64)).abs() < 1e-15);
    }
    assert!(cells(&grouped) < tokens + tokens / 20, "less than 5 % padding");
    assert!(cells(&config()) > tokens + tokens / 4);
    let order = BatchOrder::new(&examples, &grouped, 4, 1, 0);
    assert_eq!(order.epoch(&examples, 0).next().map(|b| b.cols), Some(500), "the longest comes first");
    assert_ne!(rows(&order, 1), rows(&order, 2));
}

/// Memory does not grow with the data set: all batches of this one at once would take 9.6 MB.
#[test]
fn a_pass_over_the_rows_holds_one_step_at_a_time() {
    let examples: Examples = (0..8000).map(|i| example(i, 100)).collect();
    let order = BatchOrder::new(&examples, &config(), 4, 1, 0);
    // The order takes 8 bytes a row and 24 a batch, and a permutation while it is made: some 250 kB. A step of four
    // batches takes 20 kB.
    let rows = bounded(512 << 10, || {
        let mut batches = order.batches_from(&examples, Position::default());
        (0..500).map(|_| batches.next_step(4).iter().map(|batch| batch.rows).sum::<usize>()).sum::<usize>()
    });
    assert_eq!(rows, 8000);
}

#[test]
fn a_step_ends_with_its_epoch() {
    let examples: Examples = (0..7).map(|i| example(i, 1)).collect();
    let order = BatchOrder::new(&examples, &config(), 2, 42, 0);
    let mut batches = order.batches_from(&examples, Position::default());
    // Four batches an epoch, three a step.
    let sizes = [(); 5].map(|()| (batches.next_step(3).len(), batches.next_position()));
    let at = |epoch, batch| Position { epoch, batch };
    assert_eq!(sizes, [(3, at(0, 3)), (1, at(0, 4)), (3, at(1, 3)), (1, at(1, 4)), (3, at(2, 3))]);
    // A run that was stopped at the end of an epoch goes on with the next one.
    let mut resumed = order.batches_from(&examples, at(0, 4));
    let first = resumed.next_step(1);
    assert_eq!((first.first(), resumed.next_position()), (order.epoch(&examples, 1).next().as_ref(), at(1, 1)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn batches_resume_anywhere(
        lengths in prop::collection::vec(1usize..9, 1..40),
        batch_size in 0usize..7,
        seed in any::<u64>(),
        shuffle in any::<bool>(),
        group_by_length in any::<bool>(),
        packed in any::<bool>(),
        cut in 0usize..60,
    ) {
        let examples: Examples = lengths.iter().enumerate().map(|(i, n)| example(i, *n)).collect();
        // Of rows of up to 8 tokens.
        let packing = if packed { Packing::Auto } else { Packing::Off };
        let config = DataConfig { shuffle, group_by_length, packing, max_length: 12, ..config() };
        let order = BatchOrder::new(&examples, &config, batch_size, seed, 0);
        let mut whole = order.batches_from(&examples, Position::default());
        let count = cut + 2 * order.batches_per_epoch();
        let uninterrupted: Vec<_> = whole.by_ref().take(count).collect();

        let mut first = order.batches_from(&examples, Position::default());
        let mut resumed: Vec<_> = first.by_ref().take(cut).collect();
        let mut second = order.batches_from(&examples, first.next_position());
        resumed.extend(second.by_ref().take(count - cut));
        prop_assert_eq!(&resumed, &uninterrupted);
        prop_assert_eq!(second.next_position(), whole.next_position());

        // Every epoch holds every row once.
        for epoch in 0..3 {
            let batches = order.epoch(&examples, epoch);
            prop_assert_eq!(batches.len(), order.batches_per_epoch());
            let mut rows = rows(&order, epoch).concat();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
            let at = epoch * order.batches_per_epoch();
            for (batch, same) in batches.zip(uninterrupted.iter().skip(at)) {
                prop_assert_eq!(&batch, same);
            }
        }
    }
}
