//! Losses and their derivatives beside scalar formulas in f64.

use super::*;
use burn::tensor::Device;
use qlora_data::{Example, JudgedRows, MASKED_LABEL};

/// Prompt and answer tokens of each row.
const ROWS: [[usize; 2]; 6] = [[3, 4], [3, 2], [1, 1], [1, 5], [5, 3], [5, 6]];

fn batch_of(sides: &[Side], paired: bool) -> Batch {
    let row = |(number, [prompt, answer]): (usize, &[usize; 2])| Example {
        input_ids: vec![number as u32 + 1; prompt + answer],
        labels: (0..prompt + answer).map(|at| if at < *prompt { MASKED_LABEL } else { 1 }).collect(),
        line: number,
    };
    let rows: Vec<Example> = ROWS.iter().take(sides.len()).enumerate().map(row).collect();
    let judged = JudgedRows { sides: sides.to_vec(), paired, ..JudgedRows::default() };
    Batch { judged: Some(Box::new(judged)), ..Batch::end_to_end(&rows) }
}

fn pairs() -> Batch {
    batch_of(&[Side::Chosen, Side::Rejected].repeat(3), true)
}

/// Log-probabilities of tokens: nothing regular, all below 0.
fn log_prob(token: usize) -> f64 {
    -0.2 - 1.7 * (token as f64 * 1.37).sin().abs()
}

fn reference(row: usize) -> f64 {
    -1.0 - 3.0 * (row as f64 * 2.1).cos().abs()
}

/// A row in numbers: log-probability of its answer, that of the reference, its tokens, and the log-probability of all that is labelled.
#[derive(Clone, Copy)]
struct Row {
    p: f64,
    r: f64,
    n: f64,
    whole: f64,
    tokens: f64,
}

fn ls(x: f64) -> f64 {
    -(-x).exp().ln_1p()
}

fn sg(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The loss of a term over pairs, as the module's page has it.
fn expected(term: Term, settings: &PreferenceConfig, rows: &[Row]) -> f64 {
    let (b, e) = (settings.beta_of(term), settings.label_smoothing);
    let pairs: Vec<(Row, Row)> = rows.chunks(2).map(|pair| (pair[0], pair[1])).collect();
    let l = |row: Row| row.p - row.r;
    let a = |row: Row| row.p / row.n;
    let odds = |row: Row| a(row) - (-a(row).exp()).ln_1p();
    let smooth = |x: f64| -(1.0 - e) * ls(x) - e * ls(-x);
    let loss = |&(c, j): &(Row, Row)| match term {
        Term::Dpo => smooth(b * (l(c) - l(j))),
        Term::Robust => (-(1.0 - e) * ls(b * (l(c) - l(j))) + e * ls(-b * (l(c) - l(j)))) / (1.0 - 2.0 * e),
        Term::Hinge => (1.0 - b * (l(c) - l(j))).max(0.0),
        Term::Ipo => (l(c) / c.n - l(j) / j.n - 0.5 / b).powi(2),
        Term::ApoZero => 1.0 - sg(b * l(c)) + sg(b * l(j)),
        Term::ApoDown => sg(b * l(c)) + 1.0 - sg(b * (l(c) - l(j))),
        Term::Orpo => -b * ls(odds(c) - odds(j)),
        Term::Simpo => smooth(b * (a(c) - a(j)) - settings.simpo_gamma),
        Term::Cpo => smooth(b * (c.p - j.p)),
        Term::Sft | Term::Kto => 0.0,
    };
    let mean = pairs.iter().map(loss).sum::<f64>() / pairs.len() as f64;
    let of_chosen = |value: fn(&Row) -> f64| pairs.iter().map(|(c, _)| value(c)).sum::<f64>();
    let written = -of_chosen(|c| c.p) / of_chosen(|c| c.n);
    let alpha = if term == Term::Sft { 1.0 } else { settings.alpha_of(term) };
    let whole = if term == Term::Orpo { -of_chosen(|c| c.whole) / of_chosen(|c| c.tokens) } else { 0.0 };
    mean + alpha * written + whole
}

/// Loss, derivatives by the labelled tokens' log-probabilities, and figures.
fn computed(preferences: &Preferences, batch: &Batch, values: &[f64], apart: f64) -> (f64, Vec<f64>, Vec<f64>) {
    let device = Device::flex();
    let (_, _, tokens) = AnswerTokens::of(batch, preferences.learns_prompts());
    let log_probs = numbers(values.iter().map(|value| *value as f32).collect(), &device);
    let policy = tokens.sums(&log_probs).tracked();
    let of_rows = (0..batch.rows).map(|row| reference(row) as f32).collect();
    let reference = preferences.has_reference().then(|| numbers(of_rows, &device).autodiff());
    let counts = Counts::of([batch]);
    let divisors = Divisors {
        items: if counts.pairs > 0 { counts.pairs } else { counts.chosen + counts.rejected } as f64,
        answer_tokens: tokens.of_side(batch, Side::Chosen).max(1) as f64,
        tokens: tokens.whole_of_chosen(batch).max(1) as f64,
    };
    let log_probs = LogProbs { policy, reference };
    let (loss, figures) = preferences.loss(batch, &log_probs, divisors, apart);
    let weights = tokens.weights(&log_probs.policy, &loss.backward());
    let values = |tensor: Tensor<1>| -> Vec<f64> { tensor.into_data().iter::<f64>().collect() };
    (values(loss.without_autodiff())[0], values(weights), values(figures))
}

/// The rows of a batch, and of each labelled token its log-probability.
fn rows(batch: &Batch, preferences: &Preferences, nudged: Option<(usize, f64)>) -> (Vec<Row>, Vec<f64>) {
    let (_, _, tokens) = AnswerTokens::of(batch, preferences.learns_prompts());
    let with_prompts = |side: Side| preferences.learns_prompts() && side == Side::Chosen;
    let sides = &batch.judged.as_ref().unwrap().sides;
    let (mut values, mut all) = (Vec::new(), Vec::new());
    for (row, [prompt, answer]) in ROWS.iter().take(sides.len()).enumerate() {
        let labelled = if with_prompts(sides[row]) { prompt + answer - 1 } else { *answer };
        let first = values.len();
        values.extend(
            (first..first + labelled)
                .map(|token| log_prob(token) + nudged.filter(|(at, _)| *at == token).map_or(0.0, |(_, by)| by)),
        );
        let of_row = &values[first..];
        all.push(Row {
            p: of_row[labelled - answer..].iter().sum(),
            r: reference(row),
            n: *answer as f64,
            whole: of_row.iter().sum(),
            tokens: labelled as f64,
        });
    }
    assert_eq!(tokens.sums(&numbers(vec![0.0; values.len()], &Device::flex())).into_answers().dims(), [sides.len()]);
    (all, values)
}

fn preferences(term: Term, smoothing: f64) -> Preferences {
    let settings = PreferenceConfig { beta: Some(0.3), label_smoothing: smoothing, ..PreferenceConfig::default() };
    Preferences { objective: Objective::One(term), settings }
}

#[test]
fn losses_and_derivatives_are_those_of_the_formulas() {
    let batch = pairs();
    for (term, smoothing) in
        Term::ALL.into_iter().filter(|term| *term != Term::Kto).flat_map(|term| [(term, 0.0), (term, 0.2)])
    {
        let preferences = preferences(term, smoothing);
        let (all, values) = rows(&batch, &preferences, None);
        let (loss, weights, _) = computed(&preferences, &batch, &values, 0.0);
        let oracle = expected(term, &preferences.settings, &all);
        assert!((loss - oracle).abs() < 2e-6 * oracle.abs().max(1.0), "{term} {smoothing}: {loss} {oracle}");
        for (token, weight) in weights.iter().enumerate() {
            let at = |by: f64| expected(term, &preferences.settings, &rows(&batch, &preferences, Some((token, by))).0);
            let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
            // Central differences in f64 are exact to 1e-9 here; the rest is f32.
            assert!((weight - slope).abs() < 2e-6, "{term} {smoothing}, token {token}: {weight} {slope}");
        }
    }
}

#[test]
fn answers_that_are_judged_one_by_one_are_weighted_and_compared_with_z() {
    let sides = [Side::Chosen, Side::Rejected, Side::Rejected, Side::Chosen, Side::Rejected];
    let batch = batch_of(&sides, false);
    let mut preferences = preferences(Term::Kto, 0.0);
    (preferences.settings.desirable_weight, preferences.settings.undesirable_weight) = (1.5, 0.75);
    let apart = 0.4;
    let loss_of = |rows: &[Row]| {
        let of = |(row, side): (&Row, &Side)| match side {
            Side::Chosen => 1.5 * (1.0 - sg(0.3 * (row.p - row.r - apart))),
            Side::Rejected => 0.75 * (1.0 - sg(0.3 * (apart - row.p + row.r))),
        };
        rows.iter().zip(&sides).map(of).sum::<f64>() / 5.0
    };
    let (all, values) = rows(&batch, &preferences, None);
    let (loss, weights, figures) = computed(&preferences, &batch, &values, apart);
    assert!((loss - loss_of(&all)).abs() < 1e-6, "{loss} {}", loss_of(&all));
    for (token, weight) in weights.iter().enumerate() {
        let at = |by: f64| loss_of(&rows(&batch, &preferences, Some((token, by))).0);
        let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((weight - slope).abs() < 2e-6, "token {token}: {weight} {slope}");
    }
    let rewards = |wanted: Side| -> f64 {
        all.iter().zip(sides).filter(|(_, side)| *side == wanted).map(|(row, _)| 0.3 * (row.p - row.r)).sum()
    };
    assert!((figures[0] - rewards(Side::Chosen)).abs() < 1e-5 && (figures[1] - rewards(Side::Rejected)).abs() < 1e-5);
    // A step whose answers are all of one kind has a loss, too.
    let same = batch_of(&[Side::Rejected; 3], false);
    let (all, values) = rows(&same, &preferences, None);
    let (loss, _, figures) = computed(&preferences, &same, &values, 0.0);
    let oracle = all.iter().map(|row| 0.75 * (1.0 - sg(-0.3 * (row.p - row.r)))).sum::<f64>() / 3.0;
    assert!((loss - oracle).abs() < 1e-6, "{loss} {oracle}");
    let told = PreferenceFigures::new(&figures, Counts::of([&same]), Some(0.0));
    assert_eq!((told.rewards_chosen, told.rewards_accuracy, told.kl), (None, None, Some(0.0)));
}

#[test]
fn a_sum_of_objectives_is_the_sum_of_their_losses() {
    let batch = pairs();
    let settings = PreferenceConfig::default();
    let terms = [(Term::Sft, 0.5), (Term::Dpo, 1.0), (Term::Simpo, 0.25)];
    let preferences = Preferences { objective: Objective::Sum(terms.into_iter().collect()), settings };
    let (all, values) = rows(&batch, &preferences, None);
    let (loss, _, figures) = computed(&preferences, &batch, &values, 0.0);
    let oracle: f64 = terms.iter().map(|(term, weight)| weight * expected(*term, &preferences.settings, &all)).sum();
    assert!((loss - oracle).abs() < 1e-5, "{loss} {oracle}");
    // Rewards are those of the term with a reference.
    let reward = |row: &Row| 0.1 * (row.p - row.r);
    let right = all.chunks(2).filter(|pair| reward(&pair[0]) > reward(&pair[1])).count();
    assert_eq!(figures[2], right as f64);
    let chosen: f64 = all.iter().step_by(2).map(reward).sum();
    assert!((figures[0] - chosen).abs() < 1e-5, "{figures:?}");
}

#[test]
fn an_answer_that_is_certain_has_finite_odds() {
    let batch = pairs();
    let preferences = preferences(Term::Orpo, 0.0);
    let (_, values) = rows(&batch, &preferences, None);
    let (loss, weights, _) = computed(&preferences, &batch, &vec![-1e-9; values.len()], 0.0);
    assert!(loss.is_finite() && weights.iter().all(|weight| weight.is_finite()), "{loss} {weights:?}");
}
