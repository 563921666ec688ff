//! A case as a line of the table and of the record.

use serde_json::{Value, json};

use super::case::Case;
use super::measure::Measured;
use super::peers::Answer;
use super::scaling::Scaled;

/// Steps from which on the memory's course is a line of the table.
const LONG: usize = 100;

/// A case under a policy, and what came of it.
pub(crate) struct Row {
    pub policy: String,
    pub case: Case,
    pub result: Result<Measured, String>,
    /// Seconds that the step's operations take at the dense peak.
    pub bound: Option<f64>,
    /// The same of several ranks, where they were measured.
    pub scaled: Option<Result<Scaled, String>>,
}

impl Row {
    pub(crate) fn header() -> String {
        let [policy, case, ms, spread, rate, share] = ["policy", "case", "step ms", "+-", "tok/s", "share"];
        let [host, launches, in_use, reserved, driver] = ["host ms", "launches", "in use", "reserved", "driver"];
        let [first, load] = ["first s", "load s"];
        format!(
            "{policy:<17} {case:>14} {ms:>9} {spread:>6} {rate:>8} {share:>6} {host:>8} {launches:>8} {in_use:>7} \
             {reserved:>8} {driver:>7} {first:>8} {load:>7}"
        )
    }

    pub(crate) fn line(&self) -> String {
        let start = format!("{:<17} {:>14}", self.policy, self.case);
        let m = match &self.result {
            Ok(measured) => measured,
            Err(error) => return format!("{start}  {}", error.split_whitespace().collect::<Vec<_>>().join(" ")),
        };
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let share = or_dash(self.share().map(|share| format!("{:.0} %", 100.0 * share)));
        let host = or_dash(m.host_seconds.map(|host| format!("{:.1}", 1e3 * host)));
        let driver = or_dash(m.driver_bytes.map(gib));
        format!(
            "{start} {:>9.1} {:>4.1} % {:>8.0} {share:>6} {host:>8} {:>8} {:>7} {:>8} {driver:>7} {:>8.1} {:>7.1}",
            1e3 * m.step_seconds,
            100.0 * m.spread,
            m.tokens as f64 / m.step_seconds,
            m.launches,
            gib(m.in_use_bytes),
            gib(m.reserved_bytes),
            m.first_step_seconds,
            m.load_seconds,
        )
    }

    /// The allocator over a long run, where there was one.
    pub(crate) fn memory_line(&self) -> Option<String> {
        let readings = &self.result.as_ref().ok()?.readings;
        readings.last().filter(|last| last.step >= LONG)?;
        let words = readings.iter().map(|r| format!("{}: {}/{}", r.step, mib(r.in_use_bytes), mib(r.reserved_bytes)));
        Some(format!("  MiB in use/reserved after step {}", words.collect::<Vec<_>>().join(", ")))
    }

    /// The frozen weights that wait in the host's memory, where some do.
    pub(crate) fn streamed_line(&self) -> Option<String> {
        let m = self.result.as_ref().ok().filter(|measured| measured.streamed_blocks > 0)?;
        Some(format!(
            "  {} blocks of frozen weights wait in the host's memory, GiB: {}; {} on the device for them, {} over the bus in a step; \
             loaded in {:.0} s",
            m.streamed_blocks,
            gib(m.streamed_bytes),
            gib(m.slot_bytes),
            gib(m.bus_bytes),
            m.load_seconds,
        ))
    }

    /// What several ranks do, where they were measured.
    pub(crate) fn scaled_line(&self) -> Option<String> {
        Some(match self.scaled.as_ref()? {
            Ok(scaled) => scaled.line(self.result.as_ref().ok()),
            Err(error) => format!("  ranks: {}", error.split_whitespace().collect::<Vec<_>>().join(" ")),
        })
    }

    fn share(&self) -> Option<f64> {
        Some(self.bound? / self.result.as_ref().ok()?.step_seconds)
    }

    pub(crate) fn json(&self) -> Value {
        let mut line = json!({"policy": self.policy, "case": self.case.to_string()});
        match &self.result {
            Err(error) => line["error"] = json!(error),
            Ok(measured) => {
                line["tokens_per_second"] = json!((measured.tokens as f64 / measured.step_seconds).round());
                line["share_of_limit"] = json!(self.share().map(|share| (share * 1e3).round() / 1e3));
                if let Value::Object(fields) = json!(measured) {
                    fields.into_iter().for_each(|(key, value)| line[key] = rounded(value));
                }
            }
        }
        match &self.scaled {
            Some(Ok(scaled)) => line["of_ranks"] = scaled.json(self.result.as_ref().ok()),
            Some(Err(error)) => line["of_ranks"] = json!({"error": error}),
            None => {}
        }
        line
    }
}

/// Ours over each peer's on the same case, in words.
pub(crate) fn ratios(row: &Row, peers: &[Answer]) -> Vec<String> {
    let Ok(ours) = &row.result else { return Vec::new() };
    let case = row.case.to_string();
    let same = peers.iter().filter(|answer| answer.case == case);
    same.filter_map(|answer| {
        let speed = answer.step_seconds? / ours.step_seconds;
        // Torch's `allocated` counts what our allocator has in use.
        let memory = ours.in_use_bytes as f64 / answer.allocated_bytes? as f64;
        let driver = match (ours.driver_bytes, answer.driver_bytes) {
            (Some(ours), Some(theirs)) => format!(", {:.2}x by the driver's figure", ours as f64 / theirs as f64),
            _ => String::new(),
        };
        Some(format!(
            "{} {case}: {speed:.2}x the speed of {}, {memory:.2}x its memory{driver}",
            row.policy, answer.peer
        ))
    })
    .collect()
}

/// Times without digits that mean nothing.
fn rounded(value: Value) -> Value {
    match value.as_f64().filter(|_| value.is_f64()) {
        Some(number) => json!((number * 1e5).round() / 1e5),
        None => value,
    }
}

pub(super) fn gib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / f64::from(1 << 30))
}

pub(super) fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::measure::Reading;

    fn row() -> Row {
        let measured = Measured {
            tokens: 8192,
            load_seconds: 4.0,
            first_step_seconds: 9.0,
            step_seconds: 0.5,
            spread: 0.01,
            host_seconds: Some(0.2),
            launches: 3000,
            kernels: 20,
            most_frequent: vec![("k".into(), 640)],
            base_bytes: 4 << 30,
            in_use_bytes: 6 << 30,
            reserved_bytes: 7 << 30,
            driver_bytes: None,
            readings: vec![Reading { step: 100, in_use_bytes: 3 << 20, reserved_bytes: 5 << 20 }],
            losses: [10.4, 10.3],
            streamed_blocks: 16,
            streamed_bytes: 3 << 30,
            slot_bytes: 1 << 30,
            bus_bytes: 5 << 30,
        };
        Row { policy: "full".into(), case: Case::full(4, 2048), result: Ok(measured), bound: Some(0.4), scaled: None }
    }

    #[test]
    fn a_line_has_as_many_columns_as_the_header() {
        let line = row().line().replace(" %", "%");
        let header = Row::header().replace(" ms", "_ms").replace(" s", "_s").replace("in use", "in_use");
        assert_eq!(line.split_whitespace().count(), header.split_whitespace().count(), "{header}\n{line}");
        assert!(line.contains("16384") && line.contains("80%") && line.contains("6.00"), "{line}");
        assert_eq!(row().memory_line().unwrap(), "  MiB in use/reserved after step 100: 3.0/5.0");
        let streamed = row().streamed_line().unwrap();
        assert!(
            streamed.contains("16 blocks") && streamed.contains("3.00; 1.00") && streamed.contains("5.00 over"),
            "{streamed}"
        );
        let failed = Row { result: Err("out\nof memory".into()), ..row() };
        assert!(failed.line().ends_with("out of memory"));
        assert_eq!(failed.streamed_line(), None);
        assert_eq!(failed.json()["error"], "out\nof memory");
    }

    #[test]
    fn a_record_has_rate_and_share() {
        let json = row().json();
        assert_eq!((&json["tokens_per_second"], &json["share_of_limit"]), (&json!(16384.0), &json!(0.8)));
        assert_eq!(json["launches"], 3000);
    }

    #[test]
    fn several_ranks_are_compared_with_one() {
        let scaled = Scaled {
            ranks: 2,
            transport: "by NCCL".into(),
            tokens: 16384,
            step_seconds: 0.51,
            spread: 0.01,
            waited_seconds: vec![0.002, 0.001],
            gradient_bytes: 640_000_000,
            base_bytes: 4 << 30,
            reserved_bytes: 8 << 30,
            losses: [10.4, 10.3],
        };
        let row = Row { scaled: Some(Ok(scaled)), ..row() };
        let line = row.scaled_line().unwrap();
        assert!(line.contains("2 ranks: 510.0 ms") && line.contains("1.961x of one; waited 2.0 and 1.0 ms"), "{line}");
        assert_eq!(row.json()["of_ranks"]["ratio_to_one"], json!(1.961));
        let failed = Row { scaled: Some(Err("rank 1\nis gone".into())), ..row };
        assert_eq!(failed.scaled_line().unwrap(), "  ranks: rank 1 is gone");
    }

    #[test]
    fn peers_are_compared_on_the_same_case() {
        let answer = Answer {
            peer: "P".into(),
            case: "4x2048".into(),
            step_seconds: Some(1.0),
            tokens_per_second: Some(8192.0),
            allocated_bytes: Some(12 << 30),
            reserved_bytes: None,
            driver_bytes: None,
            loss: None,
            error: None,
        };
        let other = Answer { case: "1x2048".into(), ..answer.clone() };
        assert_eq!(ratios(&row(), &[other, answer]), ["full 4x2048: 2.00x the speed of P, 0.50x its memory"]);
    }
}
