//! A TCP relay, for networks that fail without a word.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use super::MockWorker;

/// A TCP relay that can stop passing anything on while it keeps its connections.
pub struct Shim {
    pub address: std::net::SocketAddr,
    passing: tokio::sync::watch::Sender<bool>,
    accepted: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    _worker: Option<MockWorker>,
}

impl Shim {
    /// Before a worker, which it keeps.
    pub async fn before(worker: MockWorker) -> Self {
        let address = worker.address;
        Self {
            _worker: Some(worker),
            ..Self::before_address(address).await
        }
    }

    /// Before whoever listens there.
    pub async fn before_address(target: std::net::SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let address = listener.local_addr().expect("bound");
        let (passing, watching) = tokio::sync::watch::channel(true);
        let accepted = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = std::sync::Arc::clone(&accepted);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                // Whoever comes later is accepted and gets no answer.
                if !*watching.borrow() {
                    std::mem::forget(near);
                    continue;
                }
                let far = tokio::net::TcpStream::connect(target)
                    .await
                    .expect("the worker listens");
                let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                tokio::spawn(relay(near_read, far_write, watching.clone()));
                tokio::spawn(relay(far_read, near_write, watching.clone()));
            }
        });
        Self {
            address,
            passing,
            accepted,
            _worker: None,
        }
    }

    /// Connections so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(std::sync::atomic::Ordering::Relaxed)
    }

    pub fn swallow(&mut self) {
        self.passing.send_replace(false);
    }
}

async fn relay(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    passing: tokio::sync::watch::Receiver<bool>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        if !*passing.borrow() {
            // Holds the connection and says nothing.
            std::future::pending::<()>().await;
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}
