//! A TCP echo server, and the call that moves the container it runs in.
//!
//! Put the server into a container and publish its port:
//!
//! ```text
//! cargo build --release --example tcp_echo
//! podman run -d --name echo -p 7000:7000 -v ./target/release/examples:/app:ro debian:stable \
//!     /app/tcp_echo serve 7000
//! ```
//!
//! Talk to it (`nc THIS-HOST 7000`), and move it while you do:
//!
//! ```text
//! sudo target/release/examples/tcp_echo migrate echo host-b
//! ```
//!
//! A bind mount such as `/app` has to exist on the other host too.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use livemig::migration::Event;
use livemig::{Request, migrate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", port] => serve(port.parse()?),
        ["migrate", container, host] => {
            tokio::runtime::Runtime::new()?.block_on(move_away(container, host))
        }
        _ => Err("usage: tcp_echo serve PORT | tcp_echo migrate CONTAINER HOST".into()),
    }
}

/// Sends back what it gets, a thread for each connection.
fn serve(port: u16) -> Result<(), Box<dyn std::error::Error>> {
    for connection in TcpListener::bind(("0.0.0.0", port))?.incoming() {
        let connection = connection?;
        std::thread::spawn(move || echo(connection));
    }
    Ok(())
}

fn echo(mut connection: TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match connection.read(&mut buffer)? {
            0 => return Ok(()),
            length => connection.write_all(&buffer[..length])?,
        }
    }
}

/// Moves the container to a host that `livemig join` has made known, and says how it went.
async fn move_away(container: &str, host: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut observer = |event: Event| {
        if let Event::Finished { phase, took } = event {
            println!("{phase:<10} {:>8.1} ms", took.as_secs_f64() * 1e3);
        }
    };
    let report = migrate(&Request::new(container, host), &mut observer).await?;
    println!(
        "{} ms without service, {} connections kept",
        report.downtime.as_millis(),
        report.flows.len()
    );
    Ok(())
}
