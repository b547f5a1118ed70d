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
    /// Wait for every kernel after its launch, so that one that fails is named. Steps are slow, and none is recorded.
    pub debug: bool,
    /// Kernels that begin before the one in front of them is done.
    pub chain: Chain,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            record: true,
            portable: false,
            products: Products::Kept,
            profile: false,
            debug: false,
            chain: Chain::Auto,
        }
    }
}

impl Options {
    /// Whether decode steps are recorded.
    pub(super) fn records(&self) -> bool {
        self.record && !self.profile && !self.debug
    }

    /// Whether kernels are chained in a group of so many ranks, where the architecture can do it.
    pub(super) fn chains(&self, ranks: usize) -> bool {
        match self.chain {
            Chain::Auto => ranks == 1 && !self.portable,
            Chain::On => true,
            Chain::Off => false,
        }
    }
}

/// Whether kernels of the forward pass may begin before the one in front of them is done (programmatic dependent launch).
///
/// What makes it right beside kernels that are not ours, those of the libraries for products and sums over ranks:
/// - Every block of a chained kernel waits (`griddepcontrol.wait`) before it reads or writes what others write or read, and
///   before it ends. A kernel that ended without would let a library's kernel behind it begin, which waits for that
///   kernel alone, while the one before is still running.
/// - A sum over ranks says nothing to the kernel behind it, so that one's blocks begin when all of the sum's have ended, and
///   their wait makes the sum visible. A kernel that waits therefore never holds a multiprocessor that a sum needs.
/// - A sum is launched without the attribute: it begins when the kernel in front of it is done, which is the moment that
///   its own rank's part may be read by the others. Another rank reads or writes this rank's buffer only while this
///   rank's sum runs, so what a chained kernel does early (loads of weights, which nobody writes) meets nothing.
/// - In a recording the edge from a sum to a chained kernel is programmatic only if the sum is that kernel's one
///   predecessor and a kernel; where the library adds other nodes the driver has to make a full edge. A recording that
///   cannot be made is not, and says so in the log.
///
/// None of this has been measured with several ranks, so they are not chained by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Chain {
    /// In a group of one, unless kernels are to be portable.
    #[default]
    Auto,
    /// Wherever the architecture has it.
    On,
    /// Nowhere.
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_ranks_are_chained_when_asked_for_alone() {
        let chains = |chain, ranks, portable| {
            Options {
                chain,
                portable,
                ..Options::default()
            }
            .chains(ranks)
        };
        assert!(
            chains(Chain::Auto, 1, false) && !chains(Chain::Auto, 2, false) && !chains(Chain::Auto, 1, true)
        );
        assert!(chains(Chain::On, 2, false) && chains(Chain::On, 1, true));
        assert!(!chains(Chain::Off, 1, false));
    }

    #[test]
    fn steps_that_are_looked_at_are_not_recorded() {
        let records = |change: fn(&mut Options)| {
            let mut options = Options::default();
            change(&mut options);
            options.records()
        };
        assert!(records(|_| {}));
        assert!(!records(|options| options.record = false));
        assert!(!records(|options| options.profile = true));
        assert!(!records(|options| options.debug = true));
    }
}
