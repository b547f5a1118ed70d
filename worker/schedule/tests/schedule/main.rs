//! The scheduler against a device that keeps its promises in memory: see `device`.

mod device;
mod doors;
mod engine;
mod fairness;
mod golden;
mod pace;
mod pressure;
mod sharing;
mod speed;
mod worlds;
