//! A server that counts numbered UDP datagrams, and the call that moves the container it runs in.
//!
//! Each datagram starts with a sequence number, eight bytes, big-endian. The server keeps count of how
//! many it has seen, how many numbers were skipped and how many came late or twice; to an empty
//! datagram it answers with the count.
//!
//! ```text
//! cargo build --release --example udp_counter
//! podman run -d --name counter -p 7000:7000/udp -v ./target/release/examples:/app:ro debian:stable \
//!     /app/udp_counter serve 7000
//! target/release/examples/udp_counter send THIS-HOST:7000 10000   # on another machine
//! sudo target/release/examples/udp_counter migrate counter host-b
//! ```
//!
//! A bind mount such as `/app` has to exist on the other host too.

use std::net::UdpSocket;
use std::time::Duration;

use livemig::{Request, migrate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", port] => serve(port.parse()?),
        ["send", server, count] => send(server, count.parse()?),
        ["migrate", container, host] => {
            tokio::runtime::Runtime::new()?.block_on(move_away(container, host))
        }
        _ => Err(
            "usage: udp_counter serve PORT | send HOST:PORT COUNT | migrate CONTAINER HOST".into(),
        ),
    }
}

/// Counts, for ever.
fn serve(port: u16) -> Result<(), Box<dyn std::error::Error>> {
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    let mut buffer = [0; 2048];
    let (mut seen, mut skipped, mut late, mut expected) = (0u64, 0u64, 0u64, 0u64);
    loop {
        let (length, peer) = socket.recv_from(&mut buffer)?;
        let Some(number) = buffer[..length].first_chunk::<8>() else {
            socket.send_to(
                format!("{seen} seen, {skipped} skipped, {late} late or twice\n").as_bytes(),
                peer,
            )?;
            continue;
        };
        let number = u64::from_be_bytes(*number);
        seen += 1;
        if number < expected {
            late += 1;
        } else {
            skipped += number - expected;
            expected = number + 1;
        }
    }
}

/// Sends numbered datagrams, one a millisecond, and prints what the server counted.
fn send(server: &str, count: u64) -> Result<(), Box<dyn std::error::Error>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    for number in 0..count {
        socket.send(&number.to_be_bytes())?;
        std::thread::sleep(Duration::from_millis(1));
    }
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.send(&[])?;
    let mut answer = [0; 256];
    let length = socket.recv(&mut answer)?;
    print!(
        "{count} sent, {}",
        String::from_utf8_lossy(&answer[..length])
    );
    Ok(())
}

/// Moves the container to a host that `livemig join` has made known, and says how it went.
async fn move_away(container: &str, host: &str) -> Result<(), Box<dyn std::error::Error>> {
    let report = migrate(&Request::new(container, host), &mut |_event| {}).await?;
    println!(
        "{} ms without service, {} packets waited and {} were lost, at most {} ms",
        report.downtime.as_millis(),
        report.held.held,
        report.held.dropped_by_bound,
        report.held.longest_held.as_millis(),
    );
    Ok(())
}
