//! The plan in simulated worlds: scripted ones, compared with what was written down, and random ones.

mod convergence;
mod fetching;
mod traces;
mod world;
