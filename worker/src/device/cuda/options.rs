//! How a GPU computes, where there is a choice.

use super::Products;

/// Choices of a group on GPUs. The default is what serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Decode steps are recorded at start and replayed.
    pub record: bool,
    /// Kernels that are for one architecture are left alone.
    pub portable: bool,
    /// How matrix products are computed.
    pub products: Products,
    /// Tell where the time of each step goes. Steps are slower, and none is recorded.
    pub profile: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            record: true,
            portable: false,
            products: Products::Kept,
            profile: false,
        }
    }
}
