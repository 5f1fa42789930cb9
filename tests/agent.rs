//! An agent among strangers: each is refused, the agent stays up and does not grow, and its peers
//! are served as before.

mod lab;

use lab::{Lab, Node, Process};
use livemig::agent::Limits;

const AGENT: &str = "https://10.77.0.12:27757/v1/hello";

/// Makes `joining` and `inviting` known to each other, and returns the token.
async fn join(inviting: &Node, joining: &Node) -> String {
    let token = inviting
        .exec(&["livemig", "invite", "--address", &inviting.ip()])
        .await;
    let (name, own) = (inviting.name(), joining.ip());
    let join = [
        "livemig",
        "join",
        token.text(),
        "--name",
        name,
        "--address",
        &own,
    ];
    joining.exec(&join).await;
    token.text().to_owned()
}

/// What the agent's process holds: kibibytes of memory, and files.
fn size(agent: &Process) -> (usize, usize) {
    let pid = agent.pid().expect("the agent runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .expect("a process has memory");
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    (resident, files.count())
}

/// `curl` with the key of the host that runs it, as a livemig peer would call.
async fn curl_as_host(host: &Node, more: &str) -> String {
    let key = host
        .exec(&["cat", "/var/lib/livemig/identity/key.pem"])
        .await;
    let key = rcgen::KeyPair::from_pem(&key.stdout).expect("a key");
    let certificate = rcgen::CertificateParams::default()
        .self_signed(&key)
        .expect("a certificate");
    std::fs::write(host.path("/tmp/cert.pem"), certificate.pem()).expect("a directory");
    let curl = format!(
        "curl -sk --cert /tmp/cert.pem --key /var/lib/livemig/identity/key.pem \
         -H 'livemig-protocol: 2' -o /dev/null --max-time 30 -w '%{{http_code}}' {more} {AGENT} || :"
    );
    host.sh(&curl).await.text().to_owned()
}

#[tokio::test]
async fn strangers_are_refused_and_peers_are_served() {
    let lab = Lab::new(3).await;
    let [h1, h2, h3] = [lab.host(1), lab.host(2), lab.host(3)];
    let mut agent = h2.spawn_command(&["livemig", "agent"]);
    let back = h1.spawn_command(&["livemig", "agent"]);
    agent.wait_for("listening on").await;
    back.wait_for("listening on").await;
    let used = join(h2, h1).await;
    for host in [h1, h3] {
        host.run_workload("web", &[], &["echo", "7000"]).await;
    }
    let served = async |after: &str| {
        let output = h1
            .try_exec(&["livemig", "check", "web", "--to", "h2"])
            .await;
        assert!(output.status.success(), "after {after}: {output}");
        println!("served after {after}");
    };
    served("nothing").await;
    assert_eq!(
        curl_as_host(h1, "").await,
        "200",
        "what is refused below could be served"
    );
    let (memory, files) = size(&agent);

    let refused = h3
        .try_exec(&["curl", "-skf", "-H", "livemig-protocol: 2", AGENT])
        .await;
    assert!(
        !refused.status.success() && refused.stdout.is_empty(),
        "{refused}"
    );
    served("a caller without a certificate").await;

    // It knows the agent, but the agent does not know it.
    h3.exec(&["mkdir", "-p", "-m", "700", "/var/lib/livemig/peers"])
        .await;
    for peer in h1.sh("ls /var/lib/livemig/peers").await.text().lines() {
        let content = h1
            .sh(&format!("cat /var/lib/livemig/peers/{peer}"))
            .await
            .stdout;
        let copy = h3.path(&format!("/var/lib/livemig/peers/{peer}"));
        std::fs::write(copy, content).expect("a directory");
    }
    let refused = h3
        .try_exec(&["livemig", "check", "web", "--to", "h2"])
        .await;
    assert_eq!(refused.status.code(), Some(4), "{refused}");
    served("an unknown caller").await;

    let refused = h3
        .try_exec(&["livemig", "join", &used, "--name", "again"])
        .await;
    assert!(!refused.status.success(), "{refused}");
    served("a used token").await;

    let short = [
        "livemig",
        "invite",
        "--address",
        "10.77.0.12",
        "--valid",
        "1s",
    ];
    let token = h2.exec(&short).await.text().to_owned();
    // Nothing to wait for but time itself.
    tokio::time::sleep(std::time::Duration::from_millis(2100)).await;
    let refused = h3
        .try_exec(&["livemig", "join", &token, "--name", "late"])
        .await;
    assert!(!refused.status.success(), "{refused}");
    served("an expired token").await;

    let many = Limits::default().handshakes;
    let garbage = format!(
        "for n in $(seq {many}); do
             (exec 3<>/dev/tcp/10.77.0.12/27757; head -c 200000 /dev/urandom >&3; cat <&3) &
         done >/dev/null 2>&1; wait"
    );
    h3.try_exec(&["bash", "-c", &garbage]).await;
    served("garbage").await;

    // From a peer: nobody else comes as far as HTTP. Forty times what is allowed, since curl sends no
    // more than 1 MiB, in long lines, since it compares each with all others.
    let lines = Limits::default().head * 40 / 4000;
    h1.sh(&format!(
        "for n in $(seq {lines}); do printf 'x-%s: %04000d\\n' $n 0; done >/tmp/head"
    ))
    .await;
    assert_eq!(curl_as_host(h1, "-H @/tmp/head").await, "431");
    served("an endless head").await;

    let known = h2.exec(&["livemig", "--json", "hosts"]).await.json();
    let names: Vec<_> = known
        .as_array()
        .into_iter()
        .flatten()
        .map(|it| &it["name"])
        .collect();
    assert_eq!(names, ["h1"], "{known}");
    assert!(agent.is_running());

    // Connections that ended may take a moment to be put away.
    let limits = Limits::default();
    let each = limits.read_buffer + 2 * limits.tls_buffer + limits.head;
    // What was held for all of them at once may stay with the allocator, see `Limits`.
    let margin = (limits.handshakes * 70 * 1024 + limits.connections_per_peer * each) / 1024;
    let deadline = std::time::Instant::now() + limits.join_time + limits.linger;
    loop {
        let (memory_now, files_now) = size(&agent);
        if files_now <= files && memory_now <= memory + margin {
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "{memory} to {memory_now} KiB (allowed: {margin} more), {files} to {files_now} files"
        );
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }

    // Joined once, both can call.
    h2.run_workload("other", &["--ip", "10.88.0.77"], &["echo", "7000"])
        .await;
    let name = h2.exec(&["livemig", "--json", "hosts"]).await.json()[0]["name"].clone();
    let name = name.as_str().expect("a name");
    h2.exec(&["livemig", "check", "other", "--to", name]).await;
    lab.down().await;
}
