//! `make demo`: a container moves from one host to another while a client talks to it, and says in
//! plain words what came of it.
//!
//! A program rather than a test: it is for people. What it found is in `target/demo/report.json`
//! too, and in its exit code: 0 only if the connection survived, every reply was right, and the
//! container runs on the destination and nowhere else.

#[path = "mod.rs"]
mod lab;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use lab::{Lab, Node, Process};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

const PORT: &str = "7000";
/// Where livemig leaves its report on h1.
const REPORT: &str = "/tmp/migration.json";

/// What each phase does, beside the line in which livemig says that it has ended.
const MEANING: [(&str, &str); 9] = [
    ("preflight", "both hosts were looked at, nothing changed"),
    (
        "prepare",
        "a WireGuard tunnel came up; Podman exported web, all but its processes",
    ),
    (
        "precopy",
        "Podman on h2 made web of that; a CRIU waits on either host",
    ),
    (
        "hold",
        "packets for the container wait in the kernel: the downtime begins",
    ),
    (
        "freeze",
        "its processes stand still, CRIU has sent their memory to h2",
    ),
    ("transfer", "what is left became one stream of bytes"),
    ("restore", "sent, and brought to life by CRIU on h2"),
    (
        "steer",
        "what waited was let go, to h2: the downtime is over",
    ),
    ("commit", "h1 forgot the container"),
];

#[tokio::main]
async fn main() -> ExitCode {
    // `cargo test --all-targets` starts this as well, without the flag that `cargo bench` gives.
    if !std::env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    let style = Style::new();
    let lab = Lab::new(2).await;
    let report = show(&lab, &style).await;
    lab.down().await;

    let path = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/target/demo/report.json"
    ));
    let written = std::fs::create_dir_all(path.parent().expect("a file's path has a parent"))
        .and_then(|()| std::fs::write(&path, format!("{report:#}\n")));
    match written {
        Ok(()) => println!("\n   All of it: target/demo/report.json. The lab is gone again."),
        Err(error) => {
            eprintln!("{}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    if report["passed"] == true {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// All that is to be seen; returns what was.
async fn show(lab: &Lab, style: &Style) -> Value {
    let (h1, h2, c1) = (lab.host(1), lab.host(2), lab.client(1));
    println!(
        "\n{}\n\n   h1 {}, h2 {}: Podman hosts, made of namespaces on this machine; c1 {}: a client\n",
        style.bold("A container moves to another host while a client talks to it"),
        h1.ip(),
        h2.ip(),
        c1.ip()
    );

    style.step("h1, h2", "livemig setup");
    for host in [h1, h2] {
        host.exec(&["livemig", "setup"]).await;
        host.podman_service("restart").await;
    }
    println!(
        "   Podman's calls of its runtime go through livemig: all but processes can go ahead."
    );

    style.step("h2", "livemig agent");
    let _agent = join(h1, h2).await;
    println!("   h2 has invited h1: each knows the other's key.");

    style.step(
        "h1",
        &format!(
            "podman run -d --name web -p {PORT}:{PORT} {} echo {PORT}",
            lab::IMAGE
        ),
    );
    let id = h1
        .run_workload("web", &["-p", "7000:7000"], &["echo", PORT])
        .await;
    println!("   It runs, as {}.", &id[..12]);

    style.step(
        "c1",
        &format!(
            "one TCP connection to {}:{PORT}, a numbered request every 2 ms",
            h1.ip()
        ),
    );
    let client = c1
        .spawn(&["client-echo", &h1.ip(), PORT, "--every-ms", "2"])
        .await;
    // For the eye, and so that the move does not begin with the connection's first packets.
    tokio::time::sleep(Duration::from_millis(500)).await;
    println!(
        "   It gets its replies. It will never connect again: what happens to this socket counts."
    );

    style.step("h1", "livemig migrate web --to h2");
    let migrated = migrate(lab, style).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let seen = client.stop().await;

    let on_destination = h2.container_state("web").await.as_deref() == Some("running");
    let source_gone = h1.container_state("web").await.is_none();
    let told = std::fs::read_to_string(h1.path(REPORT))
        .ok()
        .and_then(|text| serde_json::from_str::<Value>(&text).ok())
        .unwrap_or(Value::Null);
    let number = |key: &str| seen[key].as_u64().unwrap_or(0);
    let wrong = number("wrong");
    let survived = seen["same_socket"] == true
        && number("resets") == 0
        && number("unanswered") == 0
        && number("replies") > 0;
    let passed = migrated && survived && wrong == 0 && on_destination && source_gone;

    println!("\n{}", style.bold("What came of it"));
    style.verdict(
        on_destination && source_gone,
        &format!(
            "web {} on h2 and {} h1",
            if on_destination {
                "runs"
            } else {
                "does not run"
            },
            if source_gone {
                "is gone from"
            } else {
                "is still on"
            }
        ),
    );
    style.verdict(
        survived,
        &format!(
            "the client's socket {} ({} → {})",
            if survived {
                "is the one it began with, and still open"
            } else {
                "did not survive"
            },
            seen["local"].as_str().unwrap_or("?"),
            seen["peer"].as_str().unwrap_or("?"),
        ),
    );
    style.verdict(
        wrong == 0 && number("unanswered") == 0,
        &format!(
            "{} requests, {} replies, {wrong} wrong, {} unanswered",
            number("requests"),
            number("replies"),
            number("unanswered"),
        ),
    );
    println!(
        "   The longest gap between two replies was {}; the median request took {:.2} ms.",
        style.bold(&format!(
            "{:.0} ms",
            seen["longest_gap_ms"].as_f64().unwrap_or(f64::NAN)
        )),
        number("median_rtt_us") as f64 / 1e3
    );
    json!({
        "passed": passed,
        "survived": survived,
        "wrong_replies": wrong,
        "source_gone": source_gone,
        "running_on_destination": on_destination,
        "longest_gap_ms": seen["longest_gap_ms"],
        "engine": told["engine"],
        "downtime_ms": told["downtime_ms"],
        "frozen_ms": told["frozen_ms"],
        "breakdown": told["breakdown"],
        "total_ms": told["total_ms"],
        "bytes_sent": told["bytes_sent"],
        "phases": told["phases"],
        "client": seen,
    })
}

/// The destination's agent, with the source let in. It ends when it is dropped.
async fn join(source: &Node, destination: &Node) -> Process {
    let agent = destination.spawn_command(&["livemig", "agent"]);
    agent.wait_for("listening on").await;
    let token = destination
        .exec(&["livemig", "invite", "--address", &destination.ip()])
        .await;
    source
        .exec(&[
            "livemig",
            "join",
            token.text(),
            "--name",
            destination.name(),
        ])
        .await;
    agent
}

/// Runs the command itself, and shows what it prints as it comes, with a word beside each phase.
async fn migrate(lab: &Lab, style: &Style) -> bool {
    let mut child = tokio::process::Command::new(lab::SCRIPT)
        .args(["--id", lab.id(), "exec", "h1"])
        .args([
            "livemig", "migrate", "web", "--to", "h2", "--report", REPORT,
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the lab's script can be run");
    let stderr = child.stderr.take().expect("it is piped");
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let phase = line.split_whitespace().next().unwrap_or_default();
        match MEANING.iter().find(|(name, _)| *name == phase) {
            Some((_, meaning)) => println!("   {line}   {}", style.dim(meaning)),
            None => println!("   {line}"),
        }
    }
    let output = child.wait_with_output().await.expect("it was started");
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        println!("   {line}");
    }
    output.status.success()
}

/// Bold and colours where a person looks, plain text elsewhere.
struct Style(bool);

impl Style {
    fn new() -> Style {
        Style(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    fn step(&self, node: &str, what: &str) {
        println!(
            "{} {}",
            self.paint("36", &format!("{node}$")),
            self.bold(what)
        );
    }

    fn verdict(&self, good: bool, what: &str) {
        let sign = if good {
            self.paint("32", "✓")
        } else {
            self.paint("31", "✗")
        };
        println!(" {sign} {what}");
    }
}
