//! The tensors of a checkpoint as a table.

use burn_qlora::adapter_io::listing::Listing;
use burn_qlora::report::{count, memory};

use crate::output::Table;

/// Parameters and bytes in words.
pub fn totals(listing: &Listing) -> String {
    format!("{} parameters, {}", count(listing.parameters()), memory(listing.bytes()))
}

/// A table of all tensors, or of groups of equal ones.
pub fn table(listing: &Listing, all: bool) -> Table {
    let mut table = Table::new(["tensor", "count", "dtype", "shape", "parameters", "size"]);
    let mut row = |name: &str, n: u64, dtype: &str, shape: &[usize], parameters: u64, bytes: u64| {
        let cells = [name.into(), n.to_string(), dtype.into(), format!("{shape:?}"), count(parameters), memory(bytes)];
        table.row(cells);
    };
    if all {
        for tensor in listing.tensors() {
            row(&tensor.name, 1, &tensor.dtype, &tensor.shape, tensor.parameters(), tensor.bytes);
        }
    } else {
        for group in listing.groups() {
            let tensor = &group.tensor;
            let parameters = group.count.saturating_mul(tensor.parameters());
            row(&tensor.name, group.count, &tensor.dtype, &tensor.shape, parameters, tensor.bytes);
        }
    }
    table
}
