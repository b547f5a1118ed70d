//! Ports of this machine that nobody uses.
//!
//! They lie below the range that the kernel takes outgoing connections' ports from: a router that tries again and again
//! to reach a worker that is down can then never be given the worker's own port, and connect to itself.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
};

/// The lowest port that is tried.
const LOWEST: u16 = 16_384;
/// Fewer candidates than this, and any port that the kernel gives will do.
const CANDIDATES_MIN: u16 = 1024;

/// A port that is held until its user is started.
#[derive(Debug)]
pub struct Held {
    listener: Option<TcpListener>,
    port: u16,
}

impl Held {
    /// The loopback address with this port.
    pub fn address(&self) -> SocketAddr {
        loopback(self.port)
    }

    /// Lets go of the port, for the process that is started now.
    pub fn release(&mut self) {
        self.listener = None;
    }
}

/// Holds a port that the user chose; 0 chooses a free one.
pub fn hold(flag: &str, port: u16, chooser: &mut Chooser) -> Result<Held, String> {
    if port == 0 {
        return chooser
            .next()
            .map_err(|error| format!("--{flag} 0: no port is free: {error}"));
    }
    match TcpListener::bind(loopback(port)) {
        Ok(listener) => Ok(Held {
            listener: Some(listener),
            port,
        }),
        Err(error) => Err(format!(
            "--{flag} {port}: {} cannot be used: {error}; choose another port",
            loopback(port)
        )),
    }
}

/// Finds free ports, one after the other.
#[derive(Debug)]
pub struct Chooser {
    candidates: Option<(u16, u16)>,
    offset: u32,
}

impl Chooser {
    /// Starts at a place that depends on `seed`, so that processes that choose at the same time do not meet.
    pub fn new(seed: u32) -> Self {
        let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let above = range
            .split_whitespace()
            .next()
            .and_then(|lowest| lowest.parse::<u16>().ok());
        let candidates = above
            .filter(|above| *above >= LOWEST + CANDIDATES_MIN)
            .map(|above| (LOWEST, above));
        // Neighbouring process ids start far apart.
        Self {
            candidates,
            offset: seed.wrapping_mul(2_654_435_761) >> 8,
        }
    }

    /// The next free port, held.
    pub fn next(&mut self) -> std::io::Result<Held> {
        if let Some((lowest, above)) = self.candidates {
            let count = u32::from(above - lowest);
            for _ in 0..count {
                let port =
                    lowest + u16::try_from(self.offset % count).expect("an offset into a range of ports");
                self.offset = self.offset.wrapping_add(1);
                if let Ok(listener) = TcpListener::bind(loopback(port)) {
                    return Ok(Held {
                        listener: Some(listener),
                        port,
                    });
                }
            }
        }
        let listener = TcpListener::bind(loopback(0))?;
        let port = listener.local_addr()?.port();
        Ok(Held {
            listener: Some(listener),
            port,
        })
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_free_and_different_while_held() {
        let mut chooser = Chooser::new(7);
        let held: Vec<Held> = (0..20).map(|_| chooser.next().expect("free")).collect();
        let mut ports: Vec<u16> = held.iter().map(|held| held.address().port()).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 20);
        for held in &held {
            TcpListener::bind(held.address()).expect_err("held");
        }
    }

    #[test]
    fn a_taken_port_is_said_with_its_flag() {
        let taken = TcpListener::bind(loopback(0)).expect("free");
        let port = taken.local_addr().expect("bound").port();
        let error = hold("http-port", port, &mut Chooser::new(1)).expect_err("taken");
        assert!(error.starts_with(&format!("--http-port {port}: ")), "{error}");
        assert!(error.ends_with("choose another port"), "{error}");
    }
}
