//! Groups of threads: what they do together, and how they end when one of them fails.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::wire::{self, Answer, HEADER, Hello};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

const SHORT: Timeouts = Timeouts { rendezvous: Duration::from_secs(5), silence: Duration::from_millis(800) };

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

fn places(world_size: usize) -> Vec<Place> {
    let port = free_port();
    let place =
        |rank| Place { rank, world_size, local_rank: rank, master_port: port, run: "test".into(), ..Place::alone() };
    (0..world_size).map(place).collect()
}

/// What each rank's work gives; ranks are threads.
fn ranks<T: Send>(world_size: usize, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    each(places(world_size), |place| work(Group::join(place, SHORT).unwrap()))
}

fn each<T: Send>(places: Vec<Place>, work: impl Fn(Place) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = places.into_iter().map(|place| scope.spawn(|| work(place))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_rank_has_what_the_operations_say() {
    for count in 1..=4 {
        let found = ranks(count, |group| {
            let rank = group.rank();
            // Longer than a frame, and empty.
            let long = vec![rank as u8; 3 * wire::PART + rank];
            assert_eq!(group.broadcast(long.clone()).unwrap(), vec![0; 3 * wire::PART]);
            assert_eq!(group.broadcast(Vec::new()).unwrap(), [0_u8; 0]);
            let gathered = group.gather(vec![rank as u8; rank]).unwrap();
            let expected: Vec<Vec<u8>> = (0..count).map(|rank| vec![rank as u8; rank]).collect();
            assert_eq!(gathered, (rank == 0).then(|| expected.clone()));
            assert_eq!(group.all_gather(vec![rank as u8; rank]).unwrap(), expected);
            assert!(!group.agree(false).unwrap() && group.agree(rank + 1 == count).unwrap());
            let mut values = vec![rank as f32, 1.0];
            group.all_reduce(&mut values).unwrap();
            assert_eq!(values, [(0..count).sum::<usize>() as f32, count as f32]);
            group.compare(&[("seed".into(), "42".into())]).unwrap();
            assert_eq!(group.hosts().len(), count);
            group.describe()
        });
        let plural = if count == 1 { "1 rank " } else { "ranks on 1 host" };
        assert!(found[0].contains(plural), "{}", found[0]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Whoever has which part: the bits are those of one process that adds part after part.
    #[test]
    fn sums_have_the_order_of_numbers(
        owners in prop::collection::vec(0..3_usize, 1..9),
        seed in any::<u32>(),
        len in prop_oneof![0..40_usize, Just((1 << 20) + 3)],
    ) {
        let part = |number: usize| -> Vec<f32> {
            let of = |i: usize| (i as u32 ^ seed).wrapping_mul(2_654_435_761).wrapping_add(number as u32 * 40_503);
            (0..len).map(|i| f32::from_bits(0x3f00_0000 | of(i) >> 8) * if of(i) & 1 == 0 { 1e-3 } else { -7.0 }).collect()
        };
        let mut expected = part(0);
        for number in 1..owners.len() {
            expected.iter_mut().zip(part(number)).for_each(|(sum, value)| *sum += value);
        }
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let sums = ranks(3, |group| {
            let mine: Vec<(usize, Vec<f32>)> = (0..owners.len()).rev().filter(|n| owners[*n] == group.rank()).map(|n| (n, part(n))).collect();
            let mine: Vec<(usize, &[f32])> = mine.iter().map(|(number, part)| (*number, &part[..])).collect();
            bits(&group.sum_parts(&mine, len).unwrap())
        });
        prop_assert!(sums.iter().all(|sum| *sum == bits(&expected)));
    }
}

#[test]
fn parts_that_do_not_fit_are_told_by_rank() {
    for (numbers, lens, words) in [
        ([0, 0], [2, 2], "part 0 is there twice"),
        ([0, 2], [2, 2], "part 2 is there twice or beyond 2"),
        ([0, 1], [2, 3], "it sums Some(3) elements where rank 0 sums 2"),
    ] {
        let errors = ranks(2, |group| {
            let values = vec![0.0; lens[group.rank()]];
            let sum = group.sum_parts(&[(numbers[group.rank()], &values)], values.len());
            let error = sum.unwrap_err().to_string();
            group.fail(&error);
            error
        });
        assert!(errors[0].starts_with("rank 1 on ") && errors[0].contains(words), "{errors:?}");
        assert!(errors[1].starts_with("rank 0 on ") && errors[1].contains(words), "{errors:?}");
    }
}

#[test]
fn a_rank_that_fails_ends_all_with_its_words() {
    for failing in 0..3 {
        let started = Instant::now();
        let errors = ranks(3, |group| {
            if group.rank() == failing {
                assert!(!group.agree(false).unwrap());
                group.fail("out of device memory: a micro-batch is too large");
                return None;
            }
            // The news may overtake what this rank has not taken of the first operation.
            let operations =
                || group.agree(false).and_then(|_| group.broadcast(vec![1])).and_then(|_| group.agree(false));
            let error = operations().unwrap_err();
            // And so does every later one.
            assert_eq!(group.all_gather(Vec::new()).unwrap_err().to_string(), error.to_string());
            assert!(error.is_of_another_rank());
            Some(error.to_string())
        });
        for error in errors.into_iter().flatten() {
            let host = host_name();
            assert_eq!(error, format!("rank {failing} on {host}: out of device memory: a micro-batch is too large"));
        }
        assert!(started.elapsed() < Duration::from_secs(4));
    }
}

#[test]
fn a_rank_that_panics_says_so() {
    let errors = ranks(2, |group| {
        let rank = group.rank();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            assert!(group.rank() == 0, "rank 1 panics");
            group.agree(false).unwrap_err().to_string()
        }));
        (rank == 0).then(|| ended.unwrap())
    });
    let error = errors[0].as_ref().unwrap();
    assert!(error.starts_with("rank 1 on ") && error.contains("it panicked"), "{error}");
}

#[test]
fn a_rank_that_leaves_early_is_named() {
    let errors =
        ranks(3, |group| if group.rank() == 1 { None } else { Some(group.agree(true).unwrap_err().to_string()) });
    for error in errors.into_iter().flatten() {
        assert!(
            error.contains("rank 1 on ") && error.contains("ended before the others") || error.contains("rank 0 on "),
            "{error}"
        );
    }
}

#[test]
fn ranks_that_differ_are_told_on_all() {
    let errors = ranks(3, |group| {
        let seed = if group.rank() == 2 { "43" } else { "42" };
        group.compare(&[("train.seed".into(), seed.into())]).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|error| *error == errors[0]));
    assert!(errors[0].contains("train.seed is 42 on rank 0") && errors[0].contains("43 on rank 2"), "{}", errors[0]);
}

#[test]
fn ranks_out_of_step_are_told() {
    let errors = ranks(2, |group| {
        match group.rank() {
            0 => group.agree(true).map(drop),
            _ => group.gather(vec![]).and_then(|_| group.agree(false)).map(drop),
        }
        .map_err(|error| {
            group.fail(&error.to_string());
            error.to_string()
        })
    });
    let error = errors[0].as_ref().unwrap_err();
    assert!(error.contains("rank 1") && error.contains("1 (gather)") && error.contains("1 (agree)"), "{error}");
    assert!(errors[1].as_ref().unwrap_err().contains("rank 0 on "));
}

/// A rank that is written by hand: it has met rank 0, and does what the test has it do.
fn by_hand(place: &Place) -> TcpStream {
    let hello = Hello {
        rank: place.rank,
        world_size: place.world_size,
        host: "by-hand".into(),
        run: place.run.clone(),
        program: env!("CARGO_PKG_VERSION").into(),
    };
    let stream = loop {
        match TcpStream::connect(place.address()) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    wire::greet(&stream, &hello).unwrap();
    assert!(matches!(wire::greeting(&stream).unwrap(), Answer::Taken));
    stream
}

/// What ranks 0 and 1 say when rank 2 does `act` after the rendezvous.
fn beside(act: impl Fn(TcpStream) + Sync) -> Vec<String> {
    let words = each(places(3), |place| {
        if place.rank == 2 {
            let stream = by_hand(&place);
            assert!(matches!(wire::greeting(&stream).unwrap(), Answer::Welcome(_)));
            act(stream);
            return String::new();
        }
        let group = Group::join(place, SHORT).unwrap();
        let started = Instant::now();
        // More than fits into the buffers of a connection: a write to a rank that is stopped waits too.
        let error = group.broadcast(vec![0; 64 << 20]).and_then(|_| group.agree(true)).unwrap_err().to_string();
        assert!(started.elapsed() < Duration::from_secs(4), "{error}");
        error
    });
    words[..2].to_vec()
}

#[test]
fn a_rank_that_says_nothing_any_more_ends_all() {
    for error in beside(|_stream| std::thread::sleep(Duration::from_secs(2))) {
        assert!(error.starts_with("rank 2 on by-hand: nothing came from it for 0.8 s"), "{error}");
    }
}

#[test]
fn a_first_rank_that_was_stopped_finds_why_the_others_are_gone() {
    let heard = each(places(2), |place| {
        if place.rank == 1 {
            return Group::join(place, SHORT).unwrap().agree(true).unwrap_err().to_string();
        }
        let (mut stream, _) = TcpListener::bind(place.address()).unwrap().accept().unwrap();
        let _: Hello = wire::greeting(&stream).unwrap();
        wire::greet(&stream, &Answer::Taken).unwrap();
        wire::greet(&stream, &Answer::Welcome(vec!["by-hand".into(), "there".into()])).unwrap();
        // What lies there when it goes on.
        std::thread::sleep(Duration::from_secs(2));
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    assert!(heard[1].starts_with("rank 0 on by-hand: nothing came from it for 0.8 s"), "{}", heard[1]);
    assert!(heard[0].contains("\"by-hand\"") && heard[0].contains("nothing came from it for 0.8 s"), "{}", heard[0]);
}

#[test]
fn a_rank_that_is_killed_ends_all() {
    for error in beside(drop) {
        assert!(error.starts_with("rank 2 on by-hand: its connection ") && error.contains("killed"), "{error}");
    }
}

#[test]
fn rubbish_from_a_rank_ends_all_and_nothing_panics() {
    // A kind of frame that there is not, a part without a message, a part beyond one, a message within another, a failure that is none.
    let call = Call { op: Op::Agree, number: 1 };
    let long = [wire::begin(call, 3), wire::part(&[1; 4])].concat();
    let twice = [wire::begin(call, 3), wire::begin(call, 3)].concat();
    let huge = [wire::begin(call, usize::MAX), vec![4, 0xff, 0xff, 0xff, 0xff]].concat();
    for bytes in [vec![9; HEADER], wire::part(&[1]), long, twice, huge, vec![2, 2, 0, 0, 0, b'x', b'y']] {
        for error in beside(|mut stream| {
            stream.write_all(&bytes).unwrap();
            // Read on, so that nothing but the rubbish ends it.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }) {
            assert!(error.starts_with("rank 2 on by-hand: what comes from it can't be read"), "{bytes:?}: {error}");
        }
    }
}

#[test]
fn who_does_not_belong_here_is_told_and_disturbs_nobody() {
    let mut all = places(2);
    let cases = [
        (Place { run: "other".into(), ..all[1].clone() }, "two runs share a port"),
        (Place { world_size: 3, ..all[1].clone() }, "this run has 2 ranks, and it was told of 3"),
        (Place { rank: 5, world_size: 6, ..all[1].clone() }, "this run has 2 ranks"),
    ];
    let (second, first) = (all.pop().unwrap(), all.pop().unwrap());
    std::thread::scope(|scope| {
        let first = scope.spawn(|| Group::join(first, SHORT).unwrap().agree(false).unwrap());
        for (place, words) in cases {
            let error = Group::join(place, SHORT).unwrap_err().to_string();
            assert!(error.contains("refuses rank") && error.contains(words), "{error}");
        }
        // Somebody who speaks another language, one who says nothing, and one who hangs up.
        let mut browser = TcpStream::connect(second.address()).unwrap();
        browser.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let _mute = TcpStream::connect(second.address()).unwrap();
        drop(TcpStream::connect(second.address()).unwrap());
        assert!(!Group::join(second.clone(), SHORT).unwrap().agree(false).unwrap());
        assert!(!first.join().unwrap());
    });
}

#[test]
fn a_rank_that_is_there_twice_is_refused() {
    let places = places(3);
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| Group::join(places[0].clone(), SHORT).map(drop));
        let _one = by_hand(&places[1]);
        let error = Group::join(places[1].clone(), SHORT).unwrap_err().to_string();
        assert!(error.contains("a rank 1 is there already, on by-hand"), "{error}");
        drop(Group::join(places[2].clone(), SHORT));
        zero.join().unwrap().unwrap();
    });
}

#[test]
fn ranks_that_do_not_come_are_named_on_all() {
    let timeouts = Timeouts { rendezvous: Duration::from_millis(700), ..SHORT };
    let errors = each(places(4), |place| match place.rank {
        0 | 2 => Group::join(place, timeouts).unwrap_err().to_string(),
        _ => String::new(),
    });
    assert!(errors[0].starts_with("ranks 1, 3 did not come within"), "{}", errors[0]);
    assert!(errors[2].contains("refuses rank 2: ranks 1, 3 did not come"), "{}", errors[2]);
}

#[test]
fn a_wrong_port_is_told() {
    let timeouts = Timeouts { rendezvous: Duration::from_millis(400), ..SHORT };
    // Nobody there.
    let place = places(2).pop().unwrap();
    let error = Group::join(place.clone(), timeouts).unwrap_err().to_string();
    assert!(error.contains("rank 1 found nobody at 127.0.0.1:") && error.contains("refused"), "{error}");
    // Somebody else there, who answers or has the port.
    let listener = TcpListener::bind(("127.0.0.1", place.master_port)).unwrap();
    let error = Group::join(Place { rank: 0, ..place.clone() }, timeouts).unwrap_err().to_string();
    assert!(error.contains(&format!("port {}", place.master_port)) && error.contains("MASTER_PORT"), "{error}");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 16]).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let error = Group::join(place, SHORT).unwrap_err().to_string();
    assert!(error.contains("is not rank 0 of a run (it begins with \"HTTP/1.1\")"), "{error}");
    server.join().unwrap();
}

/// Each rank is told of a failure once, its own included; of an end in order none is.
#[test]
fn whoever_watches_is_told_of_a_failure() {
    for fails in [true, false] {
        // A failure may overtake an answer: rank 1 fails when all have had theirs.
        let agreed = std::sync::Barrier::new(3);
        let told = ranks(3, |group| {
            let (sender, receiver) = std::sync::mpsc::channel();
            group.on_failure(move |failure| sender.send(failure.to_string()).unwrap()).unwrap();
            assert!(!group.agree(false).unwrap() && group.failure().is_none());
            agreed.wait();
            if fails && group.rank() == 1 {
                group.fail("its card is gone");
            }
            let told = if fails { receiver.recv_timeout(SHORT.rendezvous).ok() } else { None };
            assert_eq!(group.failure().map(|failure| failure.to_string()), told);
            let group_rank = group.rank();
            drop(group);
            // Nobody holds the other end any more.
            let after = receiver.recv_timeout(SHORT.rendezvous);
            assert_eq!(
                after,
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected),
                "rank {}, fails: {fails}",
                group_rank
            );
            told
        });
        for told in told {
            assert_eq!(
                told.is_some_and(|told| told.contains("rank 1 on ") && told.contains("its card is gone")),
                fails
            );
        }
    }
}
