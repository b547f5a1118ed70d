//! When connections are told to open anew elsewhere.

use tokio::{io::AsyncReadExt, net::TcpStream};

use super::*;

/// Or all clients of a router would come back at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_one_age_are_left_at_different_times() {
    const AGE: Duration = Duration::from_secs(1);
    let house = house(&[], |limits| limits.age = Some(AGE)).await;
    let began = Instant::now();
    let lives = (0..40).map(|_| async {
        let mut connection = TcpStream::connect(house.http).await.expect("it listens");
        let closed = tokio::time::timeout(LIMIT, connection.read(&mut [0; 1])).await;
        assert_eq!(closed.expect("it is closed").expect("without an error"), 0);
        began.elapsed()
    });
    let lives = futures::future::join_all(lives).await;
    let (first, last) = (lives.iter().min().expect("40"), lives.iter().max().expect("40"));
    assert!(*first >= AGE.mul_f64(0.9), "{lives:?}");
    assert!(*last <= AGE.mul_f64(1.1) + Duration::from_secs(1), "{lives:?}");
    // Of 40, all within a third of the time that they are spread over: once in 10^17 runs.
    assert!(*last - *first > AGE.mul_f64(0.2 / 3.0), "{lives:?}");
}
