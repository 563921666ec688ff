//! The CPU: the scalar oracle over blocks, in parallel.
//!
//! Device and host are one memory here, so a page changes its place without being copied.

use std::borrow::Cow;

use burn::backend::{BackendTensor, DispatchTensor, DispatchTensorKind};
use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;
use host_copies::DeviceError;
use rayon::prelude::*;

use super::{Backend, Operands};
use crate::BLOCKSIZE;
use crate::config::{Rule, Scalars};
use crate::layout::{Format, PageLayout, Segment};
use crate::pager::Memory;
use crate::reference::{self, Block8, gradient_factor};

/// Elements per task: long enough to hide the hand-over between threads.
const CHUNK: usize = 1 << 14;

/// Host memory.
#[derive(Debug)]
pub(crate) struct FlexDevice;

impl Memory for FlexDevice {
    type Page = Vec<u32>;
    type Leaving = Vec<u32>;
    type Host = Vec<u32>;

    fn zeros(&mut self, words: usize) -> Vec<u32> {
        vec![0; words]
    }

    fn upload(&mut self, page: Vec<u32>) -> Vec<u32> {
        page
    }

    fn download(&mut self, page: Vec<u32>) -> Vec<u32> {
        page
    }

    fn wait(&mut self, page: Vec<u32>) -> Result<Vec<u32>, DeviceError> {
        Ok(page)
    }

    fn host(&mut self, words: Vec<u32>) -> Vec<u32> {
        words
    }

    fn words<'a>(&self, page: &'a Vec<u32>) -> Cow<'a, [u32]> {
        page.into()
    }

    fn read(&mut self, page: &Vec<u32>) -> Result<Vec<u32>, DeviceError> {
        Ok(page.clone())
    }

    fn trim(&mut self) {}
}

impl Backend for FlexDevice {
    type Tensor = FlexTensor;

    fn open(&self, tensor: Tensor<1>) -> Option<FlexTensor> {
        match tensor.without_autodiff().into_dispatch().kind {
            DispatchTensorKind::Flex(tensor) => Some(FlexTensor::from_data(tensor.float().into_data())),
            _ => None,
        }
    }

    fn open_mut(&self, tensor: Tensor<1>) -> Option<FlexTensor> {
        // `storage_mut` copies a buffer that is shared.
        self.open(tensor)
    }

    fn close(tensor: FlexTensor) -> Tensor<1> {
        let kind = DispatchTensorKind::Flex(BackendTensor::Float(tensor));
        Tensor::from_dispatch(DispatchTensor { kind, autodiff: Default::default() })
    }

    fn update(
        &mut self,
        rule: Rule,
        layout: &PageLayout,
        page: &mut Vec<u32>,
        operands: &mut [Option<Operands<FlexTensor>>],
        norm: &FlexTensor,
    ) {
        update_page(rule, layout, page, operands, norm.storage::<f32>()[0]);
    }
}

impl FlexDevice {
    /// See [`super::update_alone`].
    pub(super) fn update_alone(
        &mut self,
        rule: Rule,
        layout: &PageLayout,
        words: Tensor<1, Int>,
        operands: Operands<Tensor<1>>,
    ) -> Option<(Tensor<1, Int>, Tensor<1>)> {
        let DispatchTensorKind::Flex(words) = words.into_dispatch().kind else { return None };
        let mut words = FlexTensor::from_data(words.int().into_data());
        let Operands { param, grad, scalars } = operands;
        let (param, grad) = (self.open_mut(param)?, self.open(grad)?);
        let mut operands = [Some(Operands { param, grad, scalars })];
        update_page(rule, layout, words.storage_mut::<u32>(), &mut operands, 0.0);
        let [Some(Operands { param, .. })] = operands else { return None };
        let kind = DispatchTensorKind::Flex(BackendTensor::Int(words));
        Some((Tensor::from_dispatch(DispatchTensor { kind, autodiff: Default::default() }), Self::close(param)))
    }
}

fn update_page(
    rule: Rule,
    layout: &PageLayout,
    page: &mut [u32],
    operands: &mut [Option<Operands<FlexTensor>>],
    norm: f32,
) {
    for segment in &layout.segments {
        let Some(Operands { param, grad, scalars }) = &mut operands[segment.parameter] else { continue };
        let Some(factor) = gradient_factor(norm, scalars) else { continue };
        let range = segment.start..segment.start + segment.len;
        let (p, g) = (&mut param.storage_mut::<f32>()[range.clone()], &grad.storage::<f32>()[range]);
        let words = &mut page[segment.word..];
        match layout.format {
            Format::Full => update_full(rule, segment, p, g, words, factor, scalars),
            Format::Block8 => update_8bit(rule, segment, p, g, words, factor, scalars),
        }
    }
}

/// Updates a segment; `words` begin with its state.
fn update_full(rule: Rule, segment: &Segment, p: &mut [f32], g: &[f32], words: &mut [u32], factor: f32, s: &Scalars) {
    let (m, rest) = words.split_at_mut(segment.moment_words(Format::Full));
    let m: &mut [f32] = bytemuck::cast_slice_mut(m);
    let chunks = p.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).zip(m.par_chunks_mut(CHUNK));
    match rule {
        Rule::AdamW => {
            let v: &mut [f32] = bytemuck::cast_slice_mut(rest);
            chunks.zip(v.par_chunks_mut(CHUNK)).for_each(|(((p, g), m), v)| reference::adamw(p, g, m, v, factor, s));
        }
        Rule::Lion => chunks.for_each(|((p, g), m)| reference::lion(p, g, m, factor, s)),
    }
}

/// Updates a segment with 8-bit state; `words` begin with it.
fn update_8bit(rule: Rule, segment: &Segment, p: &mut [f32], g: &[f32], words: &mut [u32], factor: f32, s: &Scalars) {
    let (codes, blocks) = (segment.moment_words(Format::Block8), segment.blocks());
    let (m, rest) = words.split_at_mut(codes);
    let m: &mut [u8] = bytemuck::cast_slice_mut(m);
    let chunks = p.par_chunks_mut(BLOCKSIZE).zip(g.par_chunks(BLOCKSIZE)).zip(m.par_chunks_mut(BLOCKSIZE));
    match rule {
        Rule::AdamW => {
            let (v, absmax) = rest.split_at_mut(codes);
            let v: &mut [u8] = bytemuck::cast_slice_mut(v);
            let absmax: &mut [f32] = bytemuck::cast_slice_mut(absmax);
            let (m_absmax, v_absmax) = absmax.split_at_mut(blocks);
            chunks
                .zip(v.par_chunks_mut(BLOCKSIZE))
                .zip(m_absmax.par_iter_mut().zip(v_absmax.par_iter_mut()))
                .with_min_len(CHUNK / BLOCKSIZE)
                .for_each(|((((p, g), m), v), (m_absmax, v_absmax))| {
                    let (m, v) = (Block8 { codes: m, absmax: m_absmax }, Block8 { codes: v, absmax: v_absmax });
                    reference::adamw_8bit(p, g, m, v, factor, s);
                });
        }
        Rule::Lion => {
            let absmax: &mut [f32] = bytemuck::cast_slice_mut(rest);
            chunks.zip(absmax.par_iter_mut()).with_min_len(CHUNK / BLOCKSIZE).for_each(|(((p, g), m), absmax)| {
                reference::lion_8bit(p, g, Block8 { codes: m, absmax }, factor, s);
            });
        }
    }
}
