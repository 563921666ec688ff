//! A measured case as a line of the table and of the record.

use serde_json::{Value, json};

use crate::case::{Case, Work};
use crate::ceilings::Ceilings;
use crate::timer::Timing;

/// A case with its time, and the peer's.
pub(crate) struct Row<'a> {
    pub case: &'a Case,
    pub timing: Result<Timing, String>,
    pub peer: Option<Result<f64, String>>,
}

/// Bytes per second, or operations per second where those are what takes the time.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rate {
    Bytes(f64),
    Flops(f64),
}

/// Throughput and its share of the card's: the larger of the times that the copy bandwidth and the dense
/// peak ask for, over the measured one.
fn rate(work: Work, ceilings: &Ceilings, seconds: f64) -> (Rate, f64) {
    let moving = work.bytes as f64 / ceilings.bandwidth;
    let multiplying = ceilings.flops.as_ref().map_or(0.0, |(peak, _)| work.flops as f64 / peak);
    match multiplying > moving {
        true => (Rate::Flops(work.flops as f64 / seconds), multiplying / seconds),
        false => (Rate::Bytes(work.bytes as f64 / seconds), moving / seconds),
    }
}

impl Row<'_> {
    pub(crate) fn header() -> String {
        let [kernel, shape, model, time, spread] = ["kernel", "shape", "model", "us", "+-"];
        let [rate, share, peer, ratio, bar] = ["rate", "share", "peer us", "speed-up", "bar"];
        format!(
            "{kernel:<11} {shape:<37} {model:<15} {time:>9} {spread:>5} {rate:>11} {share:>6} {peer:>9} {ratio:>8} {bar}"
        )
    }

    pub(crate) fn line(&self, ceilings: &Ceilings) -> String {
        let Case { kernel, shape, model, work, .. } = self.case;
        let start = format!("{kernel:<11} {shape:<37} {model:<15}");
        let (time, spread, rate, share) = match &self.timing {
            Err(error) => return format!("{start} {}", one_line(error, 200)),
            Ok(timing) => {
                let (rate, share) = rate(*work, ceilings, timing.seconds);
                let rate = match rate {
                    Rate::Bytes(rate) => format!("{:.0} GB/s", rate / 1e9),
                    Rate::Flops(rate) => format!("{:.0} TFLOP/s", rate / 1e12),
                };
                let mark = if timing.queued { ' ' } else { '*' };
                let spread = format!("{:.0} %", 100.0 * timing.spread);
                (format!("{:.1}{mark}", timing.seconds * 1e6), spread, rate, format!("{:.0} %", 100.0 * share))
            }
        };
        let (peer, ratio) = match (&self.peer, &self.timing) {
            (Some(Ok(peer)), Ok(timing)) => (format!("{:.1}", peer * 1e6), format!("{:.2}", peer / timing.seconds)),
            (Some(Err(error)), _) => (one_line(error, 60), String::new()),
            _ => (String::new(), String::new()),
        };
        let bar = self.case.bar.unwrap_or_default();
        format!("{start} {time:>9} {spread:>5} {rate:>11} {share:>6} {peer:>9} {ratio:>8} {bar}").trim_end().to_owned()
    }

    pub(crate) fn json(&self, ceilings: &Ceilings) -> Value {
        let Case { kernel, shape, model, work, .. } = self.case;
        let mut row = json!({"kernel": kernel, "shape": shape, "model": model});
        match &self.timing {
            Err(error) => row["error"] = json!(error),
            Ok(timing) => {
                let (rate, share) = rate(*work, ceilings, timing.seconds);
                let (key, value) = match rate {
                    Rate::Bytes(rate) => ("gb_per_second", rate / 1e9),
                    Rate::Flops(rate) => ("tflop_per_second", rate / 1e12),
                };
                row["us"] = rounded(timing.seconds * 1e6, 4);
                row["spread"] = rounded(timing.spread, 2);
                row[key] = rounded(value, 4);
                row["share_of_ceiling"] = rounded(share, 3);
                if !timing.queued {
                    row["host_included"] = json!(true);
                }
                if let Some(Ok(peer)) = self.peer {
                    row["speed_up"] = rounded(peer / timing.seconds, 3);
                }
            }
        }
        if let Some(bar) = self.case.bar {
            row["bar"] = json!(bar);
        }
        match &self.peer {
            Some(Ok(peer)) => row["peer_us"] = rounded(peer * 1e6, 4),
            Some(Err(error)) => row["peer_error"] = json!(error),
            None => {}
        }
        row
    }
}

fn one_line(text: &str, length: usize) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(length).collect()
}

/// A number with that many significant digits: no more are meant.
fn rounded(value: f64, digits: i32) -> Value {
    if value == 0.0 || !value.is_finite() {
        return json!(value);
    }
    let unit = 10_f64.powi(digits - 1 - value.abs().log10().floor() as i32);
    json!((value * unit).round() / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ceilings() -> Ceilings {
        Ceilings { bandwidth: 4e12, bandwidth_by: String::new(), flops: Some((8e14, String::new())) }
    }

    #[test]
    fn the_slower_of_memory_and_tensor_cores_is_the_ceiling() {
        let (moved, share) = rate(Work { bytes: 4_000_000, flops: 0 }, &ceilings(), 2e-6);
        assert_eq!((moved, share), (Rate::Bytes(2e12), 0.5));
        let (multiplied, share) = rate(Work { bytes: 4_000_000, flops: 8_000_000_000 }, &ceilings(), 2e-5);
        // Quotients of decimal fractions: right to the last bits.
        assert!(matches!(multiplied, Rate::Flops(rate) if (rate - 4e14).abs() < 1.0) && (share - 0.5).abs() < 1e-12);
        let unknown = Ceilings { flops: None, ..ceilings() };
        assert_eq!(rate(Work { bytes: 4, flops: 8_000_000 }, &unknown, 1e-12), (Rate::Bytes(4e12), 1.0));
    }

    #[test]
    fn numbers_have_the_digits_that_are_meant() {
        assert_eq!(rounded(123.456, 4), json!(123.5));
        assert_eq!(rounded(0.000_987_65, 3), json!(0.000_988));
        assert_eq!(rounded(0.0, 3), json!(0.0));
    }
}
