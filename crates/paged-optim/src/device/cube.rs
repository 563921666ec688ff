//! Every CubeCL runtime.
//!
//! # Where copies run
//!
//! On CUDA, pages are allocated and uploaded on the stream of the copies ([`host_copies`]), so that a page comes in while
//! the kernel of the page before runs; CubeCL orders a kernel behind the stream that made its buffers. A page's
//! download is on the stream of the kernels instead: CubeCL knows when a buffer was made, not when a kernel wrote to it,
//! and on that stream the download is behind the update in any case. For the same reason a page that comes in gets a new
//! buffer, never the room of an old one. Other runtimes have one queue for everything.
//!
//! On the host a page rests in the pinned memory that it was read into, and goes up again straight from there.

use std::borrow::Cow;

use burn::tensor::{DType, Int, Shape, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use cubecl::server::Handle;
use host_copies::{Copies, DeviceError, Download, cube_of_int, from_cube, int_from_cube, into_cube, owned};

use super::{Backend, Operands, kernels, norm};
use crate::config::Rule;
use crate::layout::{Format, PageLayout};
use crate::pager::Memory;

/// A device behind a CubeCL client.
pub(crate) struct CubeDevice {
    copies: Copies,
    device: burn_cubecl::CubeDevice,
    /// The 8-bit maps, once they were needed.
    tables: Option<Handle>,
}

impl CubeDevice {
    pub(crate) fn new(device: burn_cubecl::CubeDevice) -> Self {
        Self { copies: Copies::of(&device.client()), device, tables: None }
    }

    /// See [`super::update_alone`].
    pub(super) fn update_alone(
        &mut self,
        rule: Rule,
        layout: &PageLayout,
        words: Tensor<1, Int>,
        operands: Operands<Tensor<1>>,
    ) -> Option<(Tensor<1, Int>, Tensor<1>)> {
        let words = owned(cube_of_int(words)?);
        let Operands { param, grad, scalars } = operands;
        let (param, grad) = (self.open_mut(param)?, self.open(grad)?);
        let norm = self.copies.client().create_from_slice(&[0; 4]);
        let mut operands = [Some(Operands { param, grad, scalars })];
        self.update_page(rule, layout, &words.handle, &mut operands, &norm);
        let [Some(Operands { param, .. })] = operands else { return None };
        Some((int_from_cube(words), Self::close(param)))
    }

    fn update_page(
        &mut self,
        rule: Rule,
        layout: &PageLayout,
        page: &Handle,
        operands: &mut [Option<Operands<CubeTensor>>],
        norm: &Handle,
    ) {
        let client = self.copies.client();
        let tables = match layout.format {
            Format::Full => None,
            Format::Block8 => Some(&*self.tables.get_or_insert_with(|| kernels::tables(client))),
        };
        let members: Vec<kernels::Member<'_>> = layout
            .segments
            .iter()
            .filter_map(|segment| {
                let Operands { param, grad, scalars } = operands[segment.parameter].as_ref()?;
                let (param, grad) = (&param.handle, &grad.handle);
                Some(kernels::Member { segment: *segment, param, grad, scalars: *scalars })
            })
            .collect();
        kernels::update(client, &kernels::Page { rule, layout, words: page, norm, tables }, members);
    }
}

/// The norm of gradients on one device; see [`norm`]. `None` if one is on another device, or if there are none.
pub(crate) fn global_norm(grads: Vec<Tensor<1>>) -> Option<Tensor<1>> {
    let grads = grads.into_iter().map(into_cube).collect::<Option<Vec<CubeTensor>>>()?;
    let (client, device) = grads.first().map(|first| (first.client.clone(), first.device.clone()))?;
    if grads.iter().any(|grad| grad.client.service_id() != client.service_id()) {
        return None;
    }
    let buffers: Vec<norm::Gradient<'_>> =
        grads.iter().map(|grad| (&grad.handle, grad.meta.shape().num_elements())).collect();
    let handle = norm::global_norm(&client, &buffers);
    Some(from_cube(CubeTensor::new_contiguous(client, device, Shape::new([1]), handle, DType::F32)))
}

impl Memory for CubeDevice {
    type Page = Handle;
    type Leaving = Download;
    type Host = Bytes;

    fn zeros(&mut self, words: usize) -> Handle {
        let (client, device) = (self.copies.client().clone(), self.device.clone());
        self.copies.on_stream(|| {
            burn_cubecl::ops::numeric::zeros_client(client, device, Shape::new([words]), DType::U32).handle
        })
    }

    fn upload(&mut self, page: Bytes) -> Handle {
        self.copies.upload(page)
    }

    fn download(&mut self, page: Handle) -> Download {
        self.copies.download_behind_kernels(page)
    }

    fn wait(&mut self, page: Download) -> Result<Bytes, DeviceError> {
        page.wait()
    }

    fn host(&mut self, words: Vec<u32>) -> Bytes {
        Bytes::from_elems(words)
    }

    fn words<'a>(&self, page: &'a Bytes) -> Cow<'a, [u32]> {
        match bytemuck::try_cast_slice(page) {
            Ok(words) => words.into(),
            Err(_) => bytemuck::pod_collect_to_vec(page).into(),
        }
    }

    fn read(&mut self, page: &Handle) -> Result<Vec<u32>, DeviceError> {
        let bytes = self.copies.download_behind_kernels(page.clone()).wait()?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    fn trim(&mut self) {
        self.copies.give_back_memory();
    }
}

impl Backend for CubeDevice {
    type Tensor = CubeTensor;

    fn open(&self, tensor: Tensor<1>) -> Option<CubeTensor> {
        into_cube(tensor).filter(|tensor| tensor.client.service_id() == self.copies.client().service_id())
    }

    fn open_mut(&self, tensor: Tensor<1>) -> Option<CubeTensor> {
        self.open(tensor).map(owned)
    }

    fn close(tensor: CubeTensor) -> Tensor<1> {
        from_cube(tensor)
    }

    fn update(
        &mut self,
        rule: Rule,
        layout: &PageLayout,
        page: &mut Handle,
        operands: &mut [Option<Operands<CubeTensor>>],
        norm: &CubeTensor,
    ) {
        self.update_page(rule, layout, page, operands, &norm.handle);
    }
}
