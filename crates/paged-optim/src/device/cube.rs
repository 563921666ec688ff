//! Every CubeCL runtime.
//!
//! # Where copies run
//!
//! On CUDA pages are allocated and uploaded on a stream of their own, so that a page comes in while the kernel of the
//! page before runs (other runtimes have one queue for everything); CubeCL orders a kernel behind the stream that made its buffers. The way out is on the stream of
//! the kernels: CubeCL knows when a buffer was made, not when another stream wrote to it, and there it is behind the
//! update without further ado. For the same reason a page that comes in gets a new buffer instead of an old one's
//! room.
//!
//! Reading a buffer gives pinned memory on CUDA (`cuMemAllocHost`, from CubeCL's pool) without waiting, and a fence
//! to wait for; a page rests in that memory and goes up again straight from it. Other runtimes give ordinary memory.

use std::borrow::Cow;
use std::future::Future;
use std::pin::Pin;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::backend::{BackendTensor, DispatchTensor, DispatchTensorKind, StreamId};
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::{Handle, ServerError};

use super::{Backend, kernels, norm};
use crate::OptimError;
use crate::config::{Rule, Scalars};
use crate::layout::PageLayout;
use crate::pager::Memory;

type Download = Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send>>;

/// A device behind a CubeCL client.
pub(crate) struct CubeDevice {
    /// A download borrows its client, and outlives the call that starts it.
    client: &'static Client,
    device: burn_cubecl::CubeDevice,
    /// Pages are allocated and uploaded on this stream, or with everything else.
    copies: Option<StreamId>,
    /// The 8-bit maps.
    tables: Option<Handle>,
}

impl CubeDevice {
    pub(crate) fn new(device: burn_cubecl::CubeDevice) -> Self {
        // One for all optimizers: every stream has memory pools of its own.
        static COPIES: LazyLock<StreamId> = LazyLock::new(StreamId::allocate);
        let client = lasting(device.client());
        let copies = (client.name() == "cuda").then(|| *COPIES);
        Self { client, device, copies, tables: None }
    }

    fn on_copies<T>(&self, work: impl FnOnce() -> T) -> T {
        match self.copies {
            Some(stream) => stream.executes(work),
            None => work(),
        }
    }

    fn finish(&self, download: Download) -> Result<Bytes, OptimError> {
        let failed = |e: &dyn std::fmt::Display| OptimError::Device(e.to_string());
        let mut read = cubecl::future::block_on(download).map_err(|e| failed(&e))?;
        read.pop().ok_or_else(|| failed(&"the device sent nothing"))
    }

    fn start(&self, page: &Handle) -> Download {
        let client: &'static Client = self.client;
        Box::pin(client.read_async(vec![page.clone()]))
    }
}

/// The norm of gradients on one device; see [`norm`].
pub(crate) fn global_norm(grads: Vec<Tensor<1>>) -> Option<Tensor<1>> {
    let grads: Vec<CubeTensor> = grads.into_iter().map(CubeDevice::open).collect();
    let (client, device) = grads.first().map(|first| (first.client.clone(), first.device.clone()))?;
    let buffers: Vec<norm::Gradient<'_>> =
        grads.iter().map(|grad| (&grad.handle, grad.meta.shape().num_elements())).collect();
    let handle = norm::global_norm(&client, &buffers);
    Some(CubeDevice::close(CubeTensor::new_contiguous(client, device, Shape::new([1]), handle, DType::F32)))
}

/// A client that is never dropped; one per device of the process.
fn lasting(client: Client) -> &'static Client {
    static CLIENTS: Mutex<Vec<&'static Client>> = Mutex::new(Vec::new());
    let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    match clients.iter().find(|known| known.service_id() == client.service_id()) {
        Some(known) => known,
        None => {
            let client = Box::leak(Box::new(client));
            clients.push(client);
            client
        }
    }
}

impl Memory for CubeDevice {
    type Page = Handle;
    /// The buffer too, whose room must not be used again before the copy is done.
    type Leaving = (Handle, Mutex<Download>);
    type Host = Bytes;

    fn zeros(&mut self, words: usize) -> Handle {
        let (client, device) = (self.client.clone(), self.device.clone());
        self.on_copies(|| {
            burn_cubecl::ops::numeric::zeros_client(client, device, Shape::new([words]), DType::U32).handle
        })
    }

    fn upload(&mut self, page: Bytes) -> Handle {
        self.on_copies(|| self.client.create(page))
    }

    fn download(&mut self, page: Handle) -> (Handle, Mutex<Download>) {
        let download = self.start(&page);
        (page, Mutex::new(download))
    }

    fn wait(&mut self, (page, download): (Handle, Mutex<Download>)) -> Result<Bytes, OptimError> {
        let bytes = self.finish(download.into_inner().unwrap_or_else(PoisonError::into_inner))?;
        drop(page);
        Ok(bytes)
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

    fn read(&mut self, page: &Handle) -> Result<Vec<u32>, OptimError> {
        let bytes = self.finish(self.start(page))?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    fn trim(&mut self) {
        // Refused only while a stream records a graph; then the next time gives the memory back.
        let _ = self.on_copies(|| self.client.memory_cleanup());
    }
}

impl Backend for CubeDevice {
    type Tensor = CubeTensor;

    fn open(tensor: Tensor<1>) -> CubeTensor {
        match tensor.into_dispatch().kind {
            DispatchTensorKind::Cube(tensor) => into_contiguous(tensor.float()),
            other => panic!("an optimizer on a GPU got a tensor of another device: {other:?}"),
        }
    }

    fn open_mut(tensor: Tensor<1>) -> CubeTensor {
        let tensor = Self::open(tensor);
        if tensor.can_mut() { tensor } else { tensor.copy() }
    }

    fn close(tensor: CubeTensor) -> Tensor<1> {
        let kind = DispatchTensorKind::Cube(BackendTensor::Float(tensor));
        Tensor::from_dispatch(DispatchTensor { kind, autodiff: Default::default() })
    }

    fn update(
        &mut self,
        rule: Rule,
        layout: &PageLayout,
        page: &mut Handle,
        tensors: &mut [Option<(CubeTensor, CubeTensor)>],
        norm: &CubeTensor,
        scalars: &Scalars,
    ) {
        let tables = self.tables.get_or_insert_with(|| kernels::tables(self.client)).clone();
        let members: Vec<kernels::Member> = layout
            .segments
            .iter()
            .filter_map(|segment| {
                let (param, grad) = tensors[segment.parameter].as_ref()?;
                Some(kernels::Member { segment: *segment, param: &param.handle, grad: &grad.handle })
            })
            .collect();
        kernels::update(self.client, rule, layout, page, &members, &norm.handle, &tables, scalars);
    }
}
