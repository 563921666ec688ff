//! The loss curve as SVG.
//!
//! The background is transparent and every colour is a middle tone, so the picture reads on a
//! white page and on a dark one. The raw training loss is a faint line under its smoothed form;
//! the evaluation loss is a line with dots, one an evaluation.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::TrainError;
use crate::metrics::History;

const SIZE: (u32, u32) = (860, 460);
/// Contrast with white and with GitHub's dark background (#0d1117) of at least 3.9 each.
const TEXT: RGBColor = RGBColor(118, 127, 138);
const TRAIN: RGBColor = RGBColor(47, 129, 247);
const EVAL: RGBColor = RGBColor(219, 109, 40);

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

/// Draws the losses of a run over its steps.
///
/// # Errors
/// The drawing library reports a failure.
pub(super) fn loss_curve(history: &History) -> Result<String, TrainError> {
    let mut svg = String::new();
    draw(history, &mut svg).map_err(|e| TrainError::Report { path: "loss.svg".into(), problem: e.to_string() })?;
    Ok(svg)
}

fn draw(history: &History, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let losses: Vec<f64> = history.steps.iter().map(|step| step.loss).collect();
    let steps = || history.steps.iter().map(|step| step.step as f64);
    let finite = |points: Vec<(f64, f64)>| points.into_iter().filter(|(_, y)| y.is_finite()).collect::<Vec<_>>();
    let raw = finite(steps().zip(losses.iter().copied()).collect());
    let smooth = finite(steps().zip(smoothed(&losses)).collect());
    let eval = finite(history.evals.iter().map(|eval| (eval.step as f64, eval.eval_loss)).collect());

    let all = || raw.iter().chain(&eval);
    let last_step = all().map(|(x, _)| *x).fold(1.0, f64::max);
    let top = all().map(|(_, y)| *y).fold(0.0, f64::max);
    let bottom = all().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    // The axis starts at 0 unless the curve would be squeezed into the upper half.
    let bottom = if bottom.is_finite() && bottom > 0.5 * top { bottom - 0.1 * (top - bottom).max(0.1) } else { 0.0 };
    let top = if top > bottom { top + 0.05 * (top - bottom) } else { bottom + 1.0 };

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let font = |size: i32| ("sans-serif", size).into_font().color(&TEXT);
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .margin_right(28)
        .x_label_area_size(48)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..last_step * 1.01, bottom..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(TEXT.mix(0.3))
        .light_line_style(TRANSPARENT)
        .axis_style(TEXT.mix(0.7))
        .x_labels(8)
        .y_labels(8)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| short(*loss, top - bottom))
        .label_style(font(15))
        .axis_desc_style(font(16))
        .x_desc("optimizer step")
        .y_desc("loss (nats per token)")
        .draw()?;
    // The legend is drawn by hand: plotters' own needs a background to be readable.
    let mut legend: Vec<(&str, RGBAColor)> = Vec::new();
    if raw != smooth {
        chart.draw_series(LineSeries::new(raw.clone(), TRAIN.mix(0.45).stroke_width(1)))?;
        legend.push(("training", TRAIN.mix(0.45)));
        chart.draw_series(LineSeries::new(smooth, TRAIN.stroke_width(2)))?;
        legend.push(("training, smoothed", TRAIN.mix(1.0)));
    } else {
        chart.draw_series(LineSeries::new(raw, TRAIN.stroke_width(2)))?;
        legend.push(("training", TRAIN.mix(1.0)));
    }
    if !eval.is_empty() {
        // A faint line: between two evaluations nothing was measured.
        chart.draw_series(LineSeries::new(eval.clone(), EVAL.mix(0.45).stroke_width(1)))?;
        chart.draw_series(eval.iter().map(|point| Circle::new(*point, 4, EVAL.filled())))?;
        legend.push(("evaluation", EVAL.mix(1.0)));
    }
    let left = SIZE.0 as i32 - 220;
    for (row, (name, color)) in legend.iter().enumerate() {
        let y = 54 + 24 * row as i32;
        area.draw(&PathElement::new([(left, y), (left + 32, y)], color.stroke_width(3)))?;
        let style = font(15).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(*name, (left + 42, y), style))?;
    }
    area.present()?;
    Ok(())
}

/// An axis label with as many decimals as the span of the axis needs.
fn short(value: f64, span: f64) -> String {
    let decimals = if span >= 5.0 {
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
