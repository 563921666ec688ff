//! The next token, from a row of logits.

use std::cmp::Ordering;
use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use qlora_models::{Candidates, CandidatesRest};

use crate::request::{Sampling, TokenLogprobs};

/// How far the sum of small weights may be off, as a device gives it.
const REST_ERROR: f64 = 1e-3;
/// What that sum lacks at most: weights that are too small for f32.
const LOST_WEIGHT: f64 = 1e-25;
/// How far f64 sums of the same weights in different orders may be apart.
const SUM_ERROR: f64 = 1e-12;

/// Chooses one sequence's tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// How often each token is in the answer.
    generated: HashMap<u32, u32>,
    /// The prompt's tokens, where a penalty looks at them.
    prompt: Vec<u32>,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// For a sequence that begins with `prompt`.
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let mut prompt = match sampling.repetition_penalty {
            1.0 => Vec::new(),
            _ => prompt.to_vec(),
        };
        prompt.sort_unstable();
        prompt.dedup();
        Self { rng: ChaCha8Rng::seed_from_u64(sampling.seed), generated: HashMap::new(), prompt, sampling }
    }

    /// Whether the token is the one of the largest logit, as the model gives it.
    pub fn takes_likeliest(&self) -> bool {
        self.sampling.temperature <= 0.0 && self.takes_logits_as_they_are()
    }

    /// The temperature, where tokens are drawn by the logits as the model gives them.
    pub fn draws_at(&self) -> Option<f64> {
        let temperature = self.sampling.temperature;
        (temperature > 0.0 && self.takes_logits_as_they_are()).then_some(temperature)
    }

    fn takes_logits_as_they_are(&self) -> bool {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, logit_bias, .. } = &self.sampling;
        *repetition_penalty == 1.0 && *presence_penalty == 0.0 && *frequency_penalty == 0.0 && logit_bias.is_empty()
    }

    /// Chooses a token and takes note of it. Random numbers depend on the seed and on how many tokens came before, on
    /// nothing else. `allowed` has a bit for each token, as [`Constraint::allowed`](crate::Constraint::allowed) gives it.
    ///
    /// `None` when no token is allowed, or a logit is no number.
    pub fn choose(&mut self, logits: &mut [f32], allowed: Option<&[u32]>) -> Option<u32> {
        self.adjust(logits);
        if let Some(allowed) = allowed {
            for (token, logit) in logits.iter_mut().enumerate() {
                if allowed.get(token / 32).is_none_or(|word| word >> (token % 32) & 1 == 0) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        // One number a token, used or not: what a token before it was allowed to be changes none.
        let point = point(&mut self.rng);
        let best = likeliest(logits)?;
        let token = match self.sampling.temperature > 0.0 {
            false => best,
            true => self.draw(logits, best, point),
        };
        *self.generated.entry(token).or_default() += 1;
        Some(token)
    }

    /// What [`choose`](Self::choose) gives for the row of which these are the largest logits, for a sampler that
    /// [draws](Self::draws_at) at the temperature of the others' weight. `None`, with nothing taken note of, where they don't decide it.
    pub fn among(&mut self, candidates: &Candidates<'_>) -> Option<u32> {
        let mut rng = self.rng.clone();
        let token = self.draw_among(candidates, point(&mut rng))?;
        self.rng = rng;
        *self.generated.entry(token).or_default() += 1;
        Some(token)
    }

    /// [`draw`](Self::draw), step by step, with bounds where it looks at the sum of all weights.
    fn draw_among(&self, candidates: &Candidates<'_>, point: f64) -> Option<u32> {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let CandidatesRest { highest, threshold, weight: rest } = candidates.rest;
        if !highest.is_finite() || !rest.is_finite() {
            return None;
        }
        let weight = |logit: f32| (f64::from(logit - highest) / temperature).exp();
        let logits = || candidates.ids.iter().copied().zip(candidates.values.iter().copied().map(f32::from_bits));
        let best = logits().filter(|(_, logit)| *logit == highest).map(|(id, _)| id).min()?;
        let least = if top_p >= 1.0 && top_k == 0 { min_p } else { 0.0 };
        let mut tokens: Vec<(u32, f64)> = logits().map(|(id, logit)| (id, weight(logit))).collect();
        tokens.retain(|(_, weight)| *weight > 0.0 && *weight >= least);
        tokens.sort_unstable_by(likelier);
        // The most that another token weighs; what all others that are kept weigh, at least and at most.
        let next = weight(threshold);
        let others = match (top_k, least > 0.0) {
            (1.., _) if top_k <= tokens.len() => {
                tokens.truncate(top_k);
                None
            }
            (1.., _) => return None,
            (0, true) if next < least => None,
            (0, true) => return None,
            (0, false) => {
                let rest = f64::from(rest);
                Some([rest * (1.0 - REST_ERROR), rest * (1.0 + REST_ERROR) + LOST_WEIGHT])
            }
        };
        let sum: f64 = tokens.iter().map(|(_, weight)| weight).sum();
        let [fewest, most] = others.unwrap_or_default();
        let total = [(sum + fewest) * (1.0 - SUM_ERROR), (sum + most) * (1.0 + SUM_ERROR)];
        let (mut mass, mut count) = (total, usize::MAX);
        if top_p < 1.0 || min_p > least {
            let (mut kept, mut index) = (0.0, 0);
            loop {
                let is_full = kept >= top_p * total[1];
                match tokens.get(index) {
                    Some((_, weight)) if *weight < min_p || is_full => break,
                    None if others.is_none() || is_full || next < min_p => break,
                    Some((_, weight)) if kept < top_p * total[0] => kept += weight,
                    _ => return None,
                }
                index += 1;
            }
            (mass, count) = ([kept; 2], index);
        }
        let [mut low, mut high] = mass.map(|mass| point * mass);
        for (token, weight) in tokens.iter().take(count) {
            low -= weight;
            high -= weight;
            match (low < 0.0, high < 0.0) {
                (true, true) => return Some(*token),
                (true, false) => return None,
                _ => {}
            }
        }
        (others.is_none() || count <= tokens.len()).then_some(best)
    }

    /// Penalties and biases.
    fn adjust(&self, logits: &mut [f32]) {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, logit_bias, .. } = &self.sampling;
        if *repetition_penalty != 1.0 {
            let new = self.generated.keys().filter(|token| self.prompt.binary_search(token).is_err());
            for token in self.prompt.iter().chain(new) {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    let penalty = *repetition_penalty as f32;
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
            }
        }
        if *presence_penalty != 0.0 || *frequency_penalty != 0.0 {
            for (token, count) in &self.generated {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    *logit -= (presence_penalty + frequency_penalty * f64::from(*count)) as f32;
                }
            }
        }
        for (token, bias) in logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
    }

    /// The token in whose part of the remaining probability `point` of [0, 1) lies.
    fn draw(&self, logits: &[f32], best: u32, point: f64) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let highest = logits[best as usize];
        let weight = |logit: f32| (f64::from(logit - highest) / temperature).exp();
        let mut tokens: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(token, &logit)| (token as u32, weight(logit))).collect();
        // Nothing that the other bounds keep is less likely than min_p, where they keep the likeliest by number alone.
        let least = if top_p >= 1.0 && top_k == 0 { min_p } else { 0.0 };
        tokens.retain(|(_, weight)| *weight > 0.0 && *weight >= least);
        if (1..tokens.len()).contains(&top_k) {
            tokens.select_nth_unstable_by(top_k - 1, likelier);
            tokens.truncate(top_k);
        }
        let total: f64 = tokens.iter().map(|(_, weight)| weight).sum();
        let mut tokens = Descending { tokens, sorted: 0 };
        // What is left of the probability: all, or that of the likeliest tokens within the bounds.
        let (mut mass, mut count) = (total, usize::MAX);
        if top_p < 1.0 || min_p > least {
            let (mut kept, mut index) = (0.0, 0);
            while let Some((_, weight)) =
                tokens.get(index).filter(|(_, weight)| *weight >= min_p && kept < top_p * total)
            {
                kept += weight;
                index += 1;
            }
            (mass, count) = (kept, index);
        }
        let mut point = point * mass;
        for index in 0..count {
            let Some((token, weight)) = tokens.get(index) else { break };
            point -= weight;
            if point < 0.0 {
                return token;
            }
        }
        best
    }
}

/// A number from 0 to 1.
fn point(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// By weight, the largest first, of equal ones by id.
fn likelier(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Tokens with their weights, the likeliest first. A vocabulary has a hundred thousand, and a draw looks at some tens of them: they
/// are sorted as far as they are asked for.
struct Descending {
    tokens: Vec<(u32, f64)>,
    sorted: usize,
}

impl Descending {
    fn get(&mut self, index: usize) -> Option<(u32, f64)> {
        while index >= self.sorted && self.sorted < self.tokens.len() {
            let rest = &mut self.tokens[self.sorted..];
            let more = (3 * self.sorted).max(64).min(rest.len());
            if more < rest.len() {
                rest.select_nth_unstable_by(more - 1, likelier);
            }
            rest[..more].sort_unstable_by(likelier);
            self.sorted += more;
        }
        self.tokens.get(index).copied()
    }
}

/// The first of the likeliest tokens; `None` when a logit is no number, or none is finite.
pub fn likeliest(logits: &[f32]) -> Option<u32> {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if *logit > logits[best] {
            best = token;
        }
    }
    logits.get(best).filter(|logit| logit.is_finite()).map(|_| best as u32)
}

/// Logits that a thread looks through at a time.
const CHUNK: usize = 1 << 14;

/// The log probability of `token` and those of the `top` likeliest tokens, of equal ones the lower ids.
pub fn logprobs(logits: &[f32], token: u32, top: usize) -> TokenLogprobs {
    let chunks: Vec<(u32, &[f32])> = (0..).step_by(CHUNK).zip(logits.chunks(CHUNK)).collect();
    let likeliest = each(&chunks, |(first, logits)| likeliest_of(*first, logits, top.max(1)));
    let mut likeliest: Vec<(u32, f32)> = likeliest.into_iter().flatten().collect();
    likeliest.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let highest = likeliest.first().map_or(f32::NEG_INFINITY, |(_, logit)| *logit);
    // Sums of chunks are added in their order, whichever thread is done first.
    let sums = each(&chunks, |(_, logits)| logits.iter().map(|logit| f64::from(logit - highest).exp()).sum::<f64>());
    let log_sum = sums.iter().sum::<f64>().ln() + f64::from(highest);
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    TokenLogprobs {
        logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |logit| logprob(*logit)),
        top: likeliest.into_iter().take(top).map(|(token, logit)| (token, logprob(logit))).collect(),
    }
}

/// The largest logits with their ids, of which the first one's is `first`; the largest first, of equal ones the lower ids.
fn likeliest_of(first: u32, logits: &[f32], most: usize) -> Vec<(u32, f32)> {
    let mut found: Vec<(u32, f32)> = Vec::with_capacity(most.min(logits.len()) + 1);
    for (id, logit) in (first..).zip(logits) {
        if found.len() < most || found.last().is_some_and(|(_, least)| logit.total_cmp(least).is_gt()) {
            let at = found.partition_point(|(_, other)| other.total_cmp(logit).is_ge());
            found.insert(at, (id, *logit));
            found.truncate(most);
        }
    }
    found
}

/// What comes of each chunk; several are looked at on several threads.
fn each<T: Send>(chunks: &[(u32, &[f32])], of: impl Fn(&(u32, &[f32])) -> T + Send + Sync) -> Vec<T> {
    match chunks {
        [chunk] => vec![of(chunk)],
        _ => chunks.par_iter().map(of).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each of some tokens is drawn.
    fn frequencies(sampling: Sampling, logits: &[f32], allowed: Option<&[u32]>) -> Vec<f64> {
        let draws = 20_000;
        let mut counts = vec![0u32; logits.len()];
        for seed in 0..draws {
            let mut sampler = Sampler::new(Sampling { seed, ..sampling.clone() }, &[]);
            counts[sampler.choose(&mut logits.to_vec(), allowed).unwrap() as usize] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / draws as f64).collect()
    }

    fn hot() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::default() }
    }

    fn softmax(logits: &[f32]) -> Vec<f64> {
        let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        logits.iter().map(|logit| f64::from(*logit).exp() / total).collect()
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        for (found, expected) in found.iter().zip(expected) {
            // Four standard deviations of a binomial with 20,000 draws are below 0.015.
            assert!((found - expected).abs() < 0.015, "{found} against {expected}");
        }
    }

    #[test]
    fn the_likeliest_is_the_first_of_equals_and_no_number_is_no_answer() {
        assert_eq!(likeliest(&[0.0, 2.0, 2.0, 1.0]), Some(1));
        assert_eq!(likeliest(&[0.0, f32::NAN]), None);
        assert_eq!(likeliest(&[f32::NEG_INFINITY; 3]), None);
        assert_eq!(likeliest(&[]), None);
    }

    #[test]
    fn frequencies_follow_the_softmax_and_every_bound_cuts_its_own() {
        // Probabilities 0.087, 0.237, 0.644, 0.032.
        let logits = [0.0, 1.0, 2.0, -1.0];
        let all = softmax(&logits);
        assert_near(&frequencies(hot(), &logits, None), &all);
        let cooler = softmax(&[0.0, 2.0, 4.0, -2.0]);
        assert_near(&frequencies(Sampling { temperature: 0.5, ..hot() }, &logits, None), &cooler);
        let two = [0.0, all[1] / (all[1] + all[2]), all[2] / (all[1] + all[2]), 0.0];
        for sampling in [
            Sampling { top_k: 2, ..hot() },
            Sampling { top_p: 0.8, ..hot() },
            // 0.237 is 0.37 of 0.644, and 0.087 is 0.14 of it.
            Sampling { min_p: 0.2, ..hot() },
            Sampling { min_p: 0.2, top_p: 0.999, ..hot() },
            // Of what top_k leaves, top_p keeps the likeliest; 0.73 of two is 0.64 of all.
            Sampling { top_k: 2, top_p: 0.8, ..hot() },
        ] {
            assert_near(&frequencies(sampling.clone(), &logits, None), &two);
        }
        assert_near(&frequencies(Sampling { top_k: 2, top_p: 0.7, ..hot() }, &logits, None), &[0.0, 0.0, 1.0, 0.0]);
        assert_near(&frequencies(hot(), &logits, Some(&[0b0110])), &two);
    }

    #[test]
    fn penalties_and_biases_move_logits_by_their_formulas() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(3, 1.5), (99, 1.0)],
            ..Sampling::default()
        };
        let mut sampler = Sampler::new(sampling, &[0, 0, 1]);
        sampler.generated = HashMap::from([(1, 2), (2, 1)]);
        let mut logits = [4.0, -1.0, 3.0, 0.0, 7.0];
        sampler.adjust(&mut logits);
        assert_eq!(logits, [2.0, -2.0 - 0.5 - 0.5, 1.5 - 0.5 - 0.25, 1.5, 7.0]);
    }

    /// A walk over all tokens, sorted, is the definition.
    #[test]
    fn what_is_sorted_in_parts_is_drawn_as_if_all_were_sorted() {
        let logits: Vec<f32> = (0..5000_u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 24) as f32 / 40.0).collect();
        for (top_k, top_p, min_p) in
            [(0, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.3, 0.0), (0, 1.0, 0.05), (700, 1.0, 0.01), (700, 0.8, 0.0)]
        {
            let sampling = Sampling { temperature: 1.3, top_k, top_p, min_p, ..Sampling::default() };
            let sampler = Sampler::new(sampling.clone(), &[]);
            let best = likeliest(&logits).unwrap();
            let weight = |id: usize| (f64::from(logits[id] - logits[best as usize]) / sampling.temperature).exp();
            let mut all: Vec<(u32, f64)> = (0..logits.len()).map(|id| (id as u32, weight(id))).collect();
            all.sort_by(likelier);
            all.truncate(if top_k == 0 { all.len() } else { top_k });
            let total: f64 = all.iter().map(|(_, weight)| weight).sum();
            let mut kept = 0.0;
            all.retain(|(_, weight)| {
                let is_kept = kept < top_p * total && *weight >= min_p;
                kept += weight;
                is_kept
            });
            let total: f64 = all.iter().map(|(_, weight)| weight).sum();
            for step in 0..200 {
                let point = f64::from(step) / 200.0 + 1e-4;
                let mut left = point * total;
                let expected = all.iter().find(|(_, weight)| {
                    left -= weight;
                    left < 0.0
                });
                assert_eq!(sampler.draw(&logits, best, point), expected.unwrap().0, "{top_k} {top_p} {min_p} {point}");
            }
        }
    }

    /// Candidates decide what the whole row decides, or nothing.
    #[test]
    fn candidates_draw_what_the_row_draws() {
        let mut decided = 0;
        let mut all = 0;
        for (spread, count) in [(3.0_f32, 200), (1.5, 200), (0.5, 30), (3.0, 3), (1.0, 64)] {
            // A few likely tokens and many that are not, as a model has them.
            let logit = |v: f32| -spread * (0.5 * v + 0.5001).ln();
            let logits: Vec<f32> = test_support::noise(count as u64, 4000).into_iter().map(logit).collect();
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            let threshold = logits[order[count] as usize];
            let highest = logits[order[0] as usize];
            let mut ids = order[..count].to_vec();
            ids.reverse();
            let values: Vec<u32> = ids.iter().map(|id| logits[*id as usize].to_bits()).collect();
            for (temperature, top_k, top_p, min_p) in [
                (1.0, 0, 1.0, 0.0),
                (0.3, 0, 1.0, 0.0),
                (1.0, 0, 0.9, 0.0),
                (0.7, 0, 0.5, 0.1),
                (1.0, 0, 1.0, 0.05),
                (1.3, 0, 0.3, 0.0),
                (1.0, 40, 1.0, 0.0),
                (2.0, 5, 0.8, 0.0),
                (1.0, 20, 1.0, 0.02),
                (1.0, 500, 0.9, 0.0),
            ] {
                let rest = &order[count..];
                let weight = |id: &u32| ((logits[*id as usize] - highest) / temperature as f32).exp();
                let rest: f32 = rest.iter().map(weight).sum();
                for error in [-5e-4, 0.0, 5e-4] {
                    let rest = CandidatesRest { highest, threshold, weight: rest * (1.0 + error) };
                    let candidates = Candidates { ids: &ids, values: &values, rest };
                    for seed in 0..100 {
                        let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
                        let [mut one, mut other] = [(); 2].map(|()| Sampler::new(sampling.clone(), &[]));
                        let expected = one.choose(&mut logits.clone(), None);
                        let found = other.among(&candidates);
                        all += 1;
                        if found.is_some() {
                            decided += 1;
                            assert_eq!(found, expected, "{spread} {count} {sampling:?}");
                        } else {
                            assert_eq!(
                                other.choose(&mut logits.clone(), None),
                                expected,
                                "{spread} {count} {sampling:?}"
                            );
                        }
                        // And go on with the same numbers.
                        assert_eq!(one.rng, other.rng);
                        assert_eq!(one.generated, other.generated);
                    }
                }
            }
        }
        assert!(decided > all / 2, "{decided} of {all} are decided");
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits = [0.3, 0.1, 0.2, 0.25];
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { seed, ..hot() }, &[]);
            (0..32).map(|_| sampler.choose(&mut logits.to_vec(), None).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn nothing_allowed_is_no_answer() {
        assert_eq!(Sampler::new(hot(), &[]).choose(&mut [1.0, 2.0], Some(&[0])), None);
        assert_eq!(Sampler::new(hot(), &[]).choose(&mut [1.0, 2.0], Some(&[])), None);
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let TokenLogprobs { logprob, top } = logprobs(&logits, 0, 2);
        let expected: Vec<f64> = softmax(&logits).iter().map(|p| p.ln()).collect();
        // One f32 rounding of a number of order 1.
        let close = |found: f32, expected: f64| (f64::from(found) - expected).abs() < 1e-6;
        assert!(close(logprob, expected[0]));
        assert_eq!([top[0].0, top[1].0], [2, 1]);
        assert!(close(top[0].1, expected[2]) && close(top[1].1, expected[1]));
        assert_eq!(logprobs(&logits, 0, 9).top.len(), 4);
    }

    #[test]
    fn log_probabilities_of_many_tokens_are_those_of_all_at_once() {
        // Values that come again, in more chunks than one: of equal ones the lower ids are taken.
        let logits: Vec<f32> =
            (0..3 * CHUNK as u32 - 5).map(|id| (id.wrapping_mul(2_654_435_761) >> 20) as f32 / 256.0).collect();
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        for token in [0, CHUNK as u32, logits.len() as u32 - 1] {
            let TokenLogprobs { logprob, top } = logprobs(&logits, token, 20);
            // Half an ulp of f32 at 16, where these numbers lie, and what f64 loses over the sum.
            assert!((f64::from(logprob) - (f64::from(logits[token as usize]) - sum.ln())).abs() < 1e-6);
            assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), order[..20]);
        }
    }
}
