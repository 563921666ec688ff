//! This process among the ranks of its run: where it stands, its device, and what it says.

use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use burn_qlora::qlora_dist::{Group, Launcher, Place, Timeouts};
use burn_qlora::{TrainConfig, TrainEvents, atomic, select_device};

use crate::doctor::cards::{self, Absent, CARDS_VARIABLE};
use crate::exit::{Code, UsageError};
use crate::output::say;

/// How long ranks wait for each other, in seconds, for both kinds of waiting.
const TIMEOUT_VARIABLE: &str = "QLORA_DIST_TIMEOUT";

/// How long ranks wait for each other, as the environment says.
pub fn timeouts() -> Result<Timeouts, UsageError> {
    let Some(value) = std::env::var_os(TIMEOUT_VARIABLE) else { return Ok(Timeouts::default()) };
    let value = value.to_string_lossy();
    match value.trim().parse::<f64>().ok().filter(|seconds| (0.5..=86_400.0).contains(seconds)) {
        Some(seconds) => {
            let seconds = Duration::from_secs_f64(seconds);
            Ok(Timeouts { rendezvous: seconds, silence: seconds })
        }
        None => Err(UsageError(format!("{TIMEOUT_VARIABLE} = \"{value}\": it must be seconds, from 0.5 to 86400"))),
    }
}

/// Gives the configuration the device of this rank: of cards that are not numbered the one of its number on the host.
///
/// # Errors
/// The configuration names one card for several ranks.
pub fn choose_device(config: &mut TrainConfig, place: &Place) -> Result<(), UsageError> {
    let visible = std::env::var(CARDS_VARIABLE).ok();
    let answers = |device: &str| select_device(device).is_ok();
    config.device = device_of(&config.device, place, visible.as_deref(), answers)?;
    Ok(())
}

fn device_of(
    name: &str,
    place: &Place,
    visible: Option<&str>,
    answers: impl Fn(&str) -> bool,
) -> Result<String, UsageError> {
    let own = format!("cuda:{}", place.card(visible));
    match name {
        _ if place.is_alone() => Ok(name.into()),
        "cuda" => Ok(own),
        "auto" => Ok(if answers(&own) { own } else { "cpu".into() }),
        card if card.starts_with("cuda:") && place.local_world_size > 1 => Err(UsageError(format!(
            "device = \"{card}\" is one card for {} ranks of this host: write \"cuda\", and each takes its own ({CARDS_VARIABLE} says \
             which there are)",
            place.local_world_size
        ))),
        other => Ok(other.into()),
    }
}

/// Refuses `--gpus` of more ranks than there are cards for, before any is started.
///
/// # Errors
/// The device is a card, and there are fewer of them.
pub fn check_cards(device: &str, ranks: usize) -> Result<(), UsageError> {
    let visible = std::env::var(CARDS_VARIABLE).ok();
    enough_cards(device, ranks, visible.as_deref(), cards::count)
}

fn enough_cards(
    device: &str,
    ranks: usize,
    visible: Option<&str>,
    count: impl Fn() -> Result<usize, Absent>,
) -> Result<(), UsageError> {
    let place = Place { world_size: ranks, local_world_size: ranks, ..Place::alone() };
    device_of(device, &place, visible, |_| true)?;
    if !["auto", "cuda"].contains(&device) {
        return Ok(());
    }
    let shown = visible.map_or(String::new(), |visible| format!(" ({CARDS_VARIABLE}=\"{visible}\")"));
    match count() {
        Ok(count) if count < ranks => Err(UsageError(format!(
            "--gpus {ranks}: this host shows {count} card{}{shown}: ask for no more than that, or train on the CPU with --device cpu",
            if count == 1 { "" } else { "s" }
        ))),
        // On the CPU ranks share the cores.
        Err(_) if device == "cuda" => Err(UsageError(format!(
            "--gpus {ranks}: no CUDA card answers{shown}: `qlora doctor` says why; --device cpu trains on the CPU"
        ))),
        _ => Ok(()),
    }
}

/// Refuses ranks of one host that have the same card.
///
/// # Errors
/// Two have; another rank failed.
fn refuse_shared_cards(group: &Group, device: &str) -> Result<()> {
    let index = device.strip_prefix("cuda:").and_then(|index| index.parse().ok()).unwrap_or(0);
    let all = group.all_gather(cards::uuid(index).unwrap_or_default().into_bytes())?;
    let of = |rank: usize| (&group.hosts()[rank], &all[rank]);
    let count = group.world_size();
    let pairs = (0..count).flat_map(|first| (first + 1..count).map(move |second| (first, second)));
    match pairs.into_iter().find(|(first, second)| of(*first) == of(*second) && !all[*first].is_empty()) {
        Some((first, second)) => Err(UsageError(format!(
            "ranks {first} and {second} on {} have the same card (UUID {}): start no more ranks than a host has cards, and let \
             {CARDS_VARIABLE} show either all of them to each rank, or to each another one",
            group.hosts()[first],
            String::from_utf8_lossy(&all[first])
        ))
        .into()),
        None => Ok(()),
    }
}

/// Meets the other ranks, and says so on rank 0.
///
/// # Errors
/// They can't be met, have devices of other kinds, or share a card.
pub fn meet(place: Place, config: &TrainConfig) -> Result<Group> {
    let group = Group::join(place, timeouts()?)?;
    let kind = config.device.split(':').next().unwrap_or_default();
    group.compare(&[("the kind of device".into(), kind.into())])?;
    if kind == "cuda" && group.world_size() > 1 {
        refuse_shared_cards(&group, &config.device)?;
    }
    if group.rank() == 0 && group.world_size() > 1 {
        say!("{}", group.describe());
    }
    Ok(group)
}

/// Ends this process when the one that started it is gone: its end of the standard input is closed then.
pub fn end_with_parent(place: &Place) {
    if place.launcher != Launcher::Qlora {
        return;
    }
    let watch = || {
        let mut nothing = [0; 16];
        while std::io::stdin().read(&mut nothing).is_ok_and(|count| count > 0) {}
        say!("error: the process that started this rank is gone");
        atomic::abandon_all();
        std::process::exit(Code::Failed as i32);
    };
    // Without a thread the rank goes on to the end, and no more.
    let _ = std::thread::Builder::new().name("parent".into()).spawn(watch);
}

/// What ranks other than 0 say of a run: nothing.
pub struct Quiet(pub Arc<AtomicBool>);

impl TrainEvents for Quiet {
    fn stop_flag(&mut self) -> Option<Arc<AtomicBool>> {
        Some(Arc::clone(&self.0))
    }

    fn should_stop(&mut self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rank_takes_its_own_card() {
        let place = |local_rank, local_world_size| Place {
            rank: 4 + local_rank,
            world_size: 8,
            local_rank,
            local_world_size,
            ..Place::alone()
        };
        let of = |name: &str, place: &Place, visible: Option<&str>, cards: usize| {
            let answers = |device: &str| (0..cards).any(|card| device == format!("cuda:{card}"));
            device_of(name, place, visible, answers).map_err(|error| error.0)
        };
        let second = place(1, 4);
        for (name, visible, cards, device) in [
            ("cuda", None, 4, "cuda:1"),
            ("auto", None, 4, "cuda:1"),
            ("auto", None, 0, "cpu"),
            ("auto", None, 1, "cpu"),
            ("cuda", Some("6"), 1, "cuda:0"),
            ("cuda", Some("6,7"), 2, "cuda:1"),
            ("cpu", None, 4, "cpu"),
        ] {
            assert_eq!(of(name, &second, visible, cards).as_deref(), Ok(device), "{name} {visible:?} {cards}");
        }
        // Before any rank is started.
        let enough = |device: &str, cards: Result<usize, ()>| {
            let count = || cards.map_err(|()| Absent::NoDriver);
            enough_cards(device, 4, Some("0,1"), count).map_err(|error| error.0)
        };
        for (device, cards) in
            [("cuda", Ok(4)), ("auto", Ok(8)), ("auto", Err(())), ("cpu", Ok(1)), ("vulkan", Err(()))]
        {
            assert_eq!(enough(device, cards), Ok(()), "{device} {cards:?}");
        }
        for device in ["cuda", "auto"] {
            let message = enough(device, Ok(2)).expect_err("two cards for four");
            assert!(
                message.starts_with("--gpus 4: this host shows 2 cards (CUDA_VISIBLE_DEVICES=\"0,1\")"),
                "{message}"
            );
        }
        assert!(enough("cuda", Err(())).is_err_and(|message| message.contains("no CUDA card answers")));
        assert!(enough("cuda:1", Ok(8)).is_err_and(|message| message.contains("one card for 4 ranks")));
        assert!(of("cuda:3", &second, None, 4).is_err_and(|message| message.contains("one card for 4 ranks")));
        assert_eq!(of("cuda:3", &place(0, 1), None, 4).as_deref(), Ok("cuda:3"));
        assert_eq!(of("cuda", &Place::alone(), None, 4).as_deref(), Ok("cuda"));
    }
}
