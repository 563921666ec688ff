//! The curves of a run as SVG: losses, and below them learning rate and gradient norm.
//!
//! The background is transparent and every colour is a middle tone, so the picture reads on a
//! white page and on a dark one. The raw training loss is a faint line under its smoothed form;
//! the evaluation loss is a line with dots, one an evaluation, with a ring around the lowest. Where the losses span more than a factor of
//! four their axis is logarithmic.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::TrainError;
use crate::metrics::History;
use crate::objective::PreferenceFigures;

const SIZE: (u32, u32) = (860, 680);
/// What the panels of answers that are compared take below.
const ANSWERS: u32 = 220;
/// The part of the height that the losses have.
const LOSSES: u32 = 460;
/// Contrast with white and with GitHub's dark background (#0d1117) of at least 3.9 each.
const TEXT: RGBColor = RGBColor(118, 127, 138);
const TRAIN: RGBColor = RGBColor(47, 129, 247);
const EVAL: RGBColor = RGBColor(219, 109, 40);
/// Losses that span more than this are drawn over a logarithmic axis.
const LOG_SPAN: f64 = 4.0;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;
type Points = Vec<(f64, f64)>;

/// A centred moving average over up to 1/15 of the values. The window shrinks towards both ends and
/// stays symmetric, so a steep start is not shifted; values that aren't finite are skipped.
pub(super) fn smoothed(values: &[f64]) -> Vec<f64> {
    let n = values.len();
    (0..n)
        .map(|i| {
            let half = (n / 30).min(i).min(n - 1 - i);
            let window = values[i - half..=i + half].iter().filter(|value| value.is_finite());
            let (sum, count) = window.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
            sum / count
        })
        .collect()
}

/// Draws losses, learning rate and gradient norm of a run over its steps.
///
/// # Errors
/// The drawing library reports a failure.
pub(super) fn curves(history: &History) -> Result<String, TrainError> {
    let mut svg = String::new();
    draw(history, &mut svg).map_err(|e| TrainError::Report { path: "loss.svg".into(), problem: e.to_string() })?;
    Ok(svg)
}

fn draw(history: &History, svg: &mut String) -> Drawn {
    let losses = Losses::of(history);
    let unit =
        if history.steps.iter().any(|step| step.preference.is_some()) { "loss" } else { "loss (nats per token)" };
    let steps = history.steps.iter();
    let x = 0.0..1.01 * losses.all().map(|(x, _)| *x).fold(1.0, f64::max);
    let compares = history.steps.iter().any(|step| step.preference.is_some());
    let height = if compares { SIZE.1 + ANSWERS } else { SIZE.1 };
    let area = SVGBackend::with_string(svg, (SIZE.0, height)).into_drawing_area();
    let (upper, lower) = area.split_vertically(LOSSES);
    let (lower, answers) = lower.split_vertically(SIZE.1 - LOSSES);
    match losses.axis() {
        // Each decade has the decimals that it needs.
        (y, true) => losses.draw(&upper, x.clone(), y.log_scale(), unit, &|loss| short(*loss, *loss))?,
        (y, false) => {
            let span = y.end - y.start;
            losses.draw(&upper, x.clone(), y, unit, &|loss| short(*loss, span))?;
        }
    }
    let (left, right) = lower.split_horizontally(SIZE.0 / 2);
    let rates = finite(steps.clone().map(|step| (step.step as f64, step.learning_rate)));
    let from_zero = |points: &Points| 0.0..1.05 * top_of(points);
    let range = from_zero(&rates);
    small(&left, x.clone(), ("learning rate", range), [rates, Vec::new()], &|rate| format!("{rate:.1e}"))?;
    let norms = finite(steps.map(|step| (step.step as f64, step.grad_norm)));
    let (top, range) = (top_of(&norms), from_zero(&norms));
    small(&right, x.clone(), ("gradient norm", range), [norms, Vec::new()], &|norm| short(*norm, top))?;
    if compares {
        let (left, right) = answers.split_horizontally(SIZE.0 / 2);
        draw_answers(history, [&left, &right], &x)?;
    }
    area.present()?;
    Ok(())
}

/// The margins of rewards, and the part of pairs in order: of steps lines, of evaluations dots.
fn draw_answers(history: &History, [left, right]: [&Area<'_>; 2], x: &Range<f64>) -> Drawn {
    let of = |figure: fn(&PreferenceFigures) -> Option<f64>| {
        let point = |step: usize, figures: &Option<PreferenceFigures>| Some((step as f64, figure(figures.as_ref()?)?));
        let of_steps = finite(history.steps.iter().filter_map(|step| point(step.step, &step.preference)));
        let of_evals = finite(history.evals.iter().filter_map(|eval| point(eval.step, &eval.preference)));
        [of_steps, of_evals]
    };
    let margins = of(|figures| figures.rewards_margin);
    let all = || margins.iter().flatten().map(|(_, y)| *y);
    let (low, high) = (all().fold(0.0, f64::min), all().fold(0.0, f64::max));
    let span = (high - low).max(1e-6);
    let range = low - 0.05 * span * f64::from(u8::from(low < 0.0))..high + 0.05 * span;
    small(left, x.clone(), ("reward margin", range), margins, &|margin| short(*margin, span))?;
    let right_order = of(|figures| figures.rewards_accuracy);
    small(right, x.clone(), ("pairs in order", 0.0..1.05), right_order, &|part| format!("{:.0} %", 100.0 * part))
}

fn finite(points: impl Iterator<Item = (f64, f64)>) -> Points {
    points.filter(|(_, y)| y.is_finite()).collect()
}

fn top_of(points: &Points) -> f64 {
    points.iter().map(|(_, y)| *y).fold(0.0, f64::max)
}

fn font(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&TEXT)
}

/// What the upper panel shows.
struct Losses {
    raw: Points,
    smooth: Points,
    eval: Points,
}

impl Losses {
    fn of(history: &History) -> Self {
        let losses: Vec<f64> = history.steps.iter().map(|step| step.loss).collect();
        let steps = || history.steps.iter().map(|step| step.step as f64);
        Self {
            raw: finite(steps().zip(losses.iter().copied())),
            smooth: finite(steps().zip(smoothed(&losses))),
            eval: finite(history.evals.iter().map(|eval| (eval.step as f64, eval.eval_loss))),
        }
    }

    fn all(&self) -> impl Iterator<Item = &(f64, f64)> {
        self.raw.iter().chain(&self.eval)
    }

    /// The range of the axis, and whether it is logarithmic.
    fn axis(&self) -> (Range<f64>, bool) {
        let top = self.all().map(|(_, y)| *y).fold(0.0, f64::max);
        let bottom = self.all().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
        if bottom > 0.0 && bottom.is_finite() && top > LOG_SPAN * bottom {
            return (bottom / 1.1..top * 1.1, true);
        }
        // The axis starts at 0 unless the curve would be squeezed into the upper half.
        let squeezed = bottom.is_finite() && bottom > 0.5 * top;
        let bottom = if squeezed { bottom - 0.1 * (top - bottom).max(0.1) } else { 0.0 };
        let top = if top > bottom { top + 0.05 * (top - bottom) } else { bottom + 1.0 };
        (bottom..top, false)
    }

    fn draw<Y>(&self, area: &Area<'_>, x: Range<f64>, axis: Y, unit: &str, label: &dyn Fn(&f64) -> String) -> Drawn
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let mut chart = ChartBuilder::on(area)
            .margin(16)
            .margin_right(28)
            .x_label_area_size(48)
            .y_label_area_size(60)
            .build_cartesian_2d(x, axis)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .bold_line_style(TEXT.mix(0.3))
            .light_line_style(TRANSPARENT)
            .axis_style(TEXT.mix(0.7))
            .x_labels(8)
            .y_labels(8)
            .x_label_formatter(&|step| format!("{step:.0}"))
            .y_label_formatter(&|loss| label(loss))
            .label_style(font(15))
            .axis_desc_style(font(16))
            .x_desc("optimizer step")
            .y_desc(unit)
            .draw()?;
        // The legend is drawn by hand: plotters' own needs a background to be readable.
        let mut legend: Vec<(String, RGBAColor)> = Vec::new();
        if self.raw != self.smooth {
            chart.draw_series(LineSeries::new(self.raw.clone(), TRAIN.mix(0.45).stroke_width(1)))?;
            legend.push(("training".into(), TRAIN.mix(0.45)));
            chart.draw_series(LineSeries::new(self.smooth.clone(), TRAIN.stroke_width(2)))?;
            legend.push(("training, smoothed".into(), TRAIN.mix(1.0)));
        } else {
            chart.draw_series(LineSeries::new(self.raw.clone(), TRAIN.stroke_width(2)))?;
            legend.push(("training".into(), TRAIN.mix(1.0)));
        }
        if let Some((step, loss)) = self.eval.iter().min_by(|a, b| a.1.total_cmp(&b.1)) {
            // A faint line: between two evaluations nothing was measured.
            chart.draw_series(LineSeries::new(self.eval.clone(), EVAL.mix(0.45).stroke_width(1)))?;
            chart.draw_series(self.eval.iter().map(|point| Circle::new(*point, 4, EVAL.filled())))?;
            chart.draw_series([Circle::new((*step, *loss), 9, EVAL.stroke_width(2))])?;
            legend.push((format!("evaluation, lowest {loss:.4}"), EVAL.mix(1.0)));
        }
        let left = SIZE.0 as i32 - 260;
        for (row, (name, color)) in legend.iter().enumerate() {
            let y = 54 + 24 * row as i32;
            area.draw(&PathElement::new([(left, y), (left + 32, y)], color.stroke_width(3)))?;
            let style = font(15).pos(Pos::new(HPos::Left, VPos::Center));
            area.draw(&Text::new(name.as_str(), (left + 42, y), style))?;
        }
        Ok(())
    }
}

/// One of the panels below: a line, and dots.
fn small(
    area: &Area<'_>,
    x: Range<f64>,
    (name, y): (&str, Range<f64>),
    [line, dots]: [Points; 2],
    label: &dyn Fn(&f64) -> String,
) -> Drawn {
    let y = if y.end > y.start { y } else { y.start..y.start + 1.0 };
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .margin_right(28)
        .margin_top(4)
        .x_label_area_size(26)
        .y_label_area_size(72)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(TEXT.mix(0.3))
        .light_line_style(TRANSPARENT)
        .axis_style(TEXT.mix(0.7))
        .x_labels(5)
        .y_labels(4)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| label(value))
        .label_style(font(14))
        .axis_desc_style(font(15))
        .y_desc(name)
        .draw()?;
    chart.draw_series(LineSeries::new(line, TRAIN.stroke_width(1)))?;
    chart.draw_series(LineSeries::new(dots.clone(), EVAL.mix(0.45).stroke_width(1)))?;
    chart.draw_series(dots.into_iter().map(|point| Circle::new(point, 3, EVAL.filled())))?;
    Ok(())
}

/// An axis label with as many decimals as the span of the axis needs.
fn short(value: f64, span: f64) -> String {
    let decimals = if span >= 50.0 {
        0
    } else if span >= 0.5 {
        1
    } else if span >= 0.05 {
        2
    } else {
        4
    };
    format!("{value:.decimals$}")
}
