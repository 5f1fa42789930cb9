//! An agent among strangers: each is refused, the agent stays up and does not grow, and its peers
//! are served as before.

mod lab;

use lab::pair::Pair;
use lab::{Lab, Node, Process};
use livemig::agent::{Limits, PROTOCOL};
use serde_json::Value;

const AGENT: &str = "https://10.77.0.12:27757";
const HELLO: &str = "/v1/hello";

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

/// What an agent answered.
#[derive(Debug)]
struct Answer {
    status: u16,
    body: Value,
}

/// `curl` with the key of the host that runs it, as a livemig peer would call.
async fn curl_as_host(host: &Node, more: &str, path: &str) -> Answer {
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
         -H 'livemig-protocol: {PROTOCOL}' --max-time 30 -w '\n%{{http_code}}' {more} {AGENT}{path} || :"
    );
    let answered = host.sh(&curl).await;
    let text = answered.text();
    // Of an empty body not even the end of its line is left.
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", text));
    Answer {
        status: status.parse().expect("a number"),
        body: serde_json::from_str(body).unwrap_or_default(),
    }
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
    let hello = curl_as_host(h1, "", HELLO).await;
    assert_eq!(hello.status, 200, "what is refused below could be served");
    let (memory, files) = size(&agent);

    let url = format!("{AGENT}{HELLO}");
    let protocol = format!("livemig-protocol: {PROTOCOL}");
    let refused = h3.try_exec(&["curl", "-skf", "-H", &protocol, &url]).await;
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
    let endless = curl_as_host(h1, "-H @/tmp/head", HELLO).await;
    assert_eq!(endless.status, 431, "{endless:?}");
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

/// Everything that a host asks for that sends a container, by the method and the path.
const OF_A_SENDER: [(&str, &str); 16] = [
    ("POST", "/v1/assess"),
    ("POST", "/v1/migrations/0123456789abcdef"),
    ("GET", "/v1/migrations/0123456789abcdef"),
    ("DELETE", "/v1/migrations/0123456789abcdef"),
    ("POST", "/v1/migrations/0123456789abcdef/probe"),
    ("PUT", "/v1/migrations/0123456789abcdef/image"),
    ("PUT", "/v1/migrations/0123456789abcdef/shell"),
    ("PUT", "/v1/migrations/0123456789abcdef/files"),
    ("PUT", "/v1/migrations/0123456789abcdef/standby"),
    ("POST", "/v1/migrations/0123456789abcdef/hold"),
    ("POST", "/v1/migrations/0123456789abcdef/restore"),
    ("POST", "/v1/migrations/0123456789abcdef/lazy"),
    ("POST", "/v1/migrations/0123456789abcdef/fetched"),
    ("POST", "/v1/migrations/0123456789abcdef/release"),
    ("POST", "/v1/migrations/0123456789abcdef/commit"),
    ("DELETE", "/v1/forwardings/0123456789abcdef"),
];

#[tokio::test]
async fn a_peer_that_may_not_send_is_refused_whatever_it_sends() {
    let pair = Pair::up().await;
    let [h1, h2] = [pair.host(1), pair.host(2)];
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let check = ["livemig", "check", "web", "--to", "h2"];
    h1.exec(&check).await;
    h1.sh("head -c 300000 /dev/urandom >/tmp/stream").await;

    for may in [
        &["receive"][..],
        &["introduce"],
        &["receive", "introduce"],
        &[],
    ] {
        let allow = [&["livemig", "allow", "h1"], may].concat();
        h2.exec(&allow).await;
        let before = h2.census().await;
        for (method, path) in OF_A_SENDER {
            // What is refused is refused unread: it need not make sense.
            let body = match method {
                "PUT" => "-T /tmp/stream",
                "POST" => "-H 'content-type: application/json' -d '{}'",
                _ => "",
            };
            let answer = curl_as_host(h1, &format!("-X {method} {body}"), path).await;
            let what = format!("{may:?}: {method} {path}: {answer:?}");
            assert_eq!(answer.status, 403, "{what}");
            assert_eq!(answer.body["code"], "may-not-send", "{what}");
            let hint = answer.body["hint"].as_str();
            assert!(
                hint.is_some_and(|hint| hint.contains("livemig allow h1 send")),
                "{what}"
            );
        }
        let migrate = ["livemig", "migrate", "web", "--to", "h2"];
        let refused = h1.try_exec(&migrate).await;
        assert_eq!(refused.status.code(), Some(4), "{refused}");
        assert!(refused.stderr.contains("may not send"), "{refused}");

        // It shares no connection with this host, so there is no path either that it could change, and
        // nobody whom it could introduce.
        let stranger = serde_json::json!({
            "name": "h9", "fingerprint": format!("SHA256:{}", "A".repeat(43)), "address": "10.77.0.19",
        });
        let expect = serde_json::json!({"addresses": ["10.88.0.5"], "anchor": stranger});
        let post = format!("-X POST -d '{expect}'");
        let answer = curl_as_host(h1, &post, "/v1/paths/0123456789abcdef/expect").await;
        assert_eq!(answer.body["code"], "no-hop", "{may:?}: {answer:?}");
        for verb in ["open", "probe", "switch", "end"] {
            let path = format!("/v1/paths/0123456789abcdef/{verb}");
            let answer = curl_as_host(h1, "-X POST -d '{\"flows\":[]}'", &path).await;
            assert!(
                (400..500).contains(&answer.status),
                "{may:?}: {verb}: {answer:?}"
            );
        }
        h2.assert_as_before(&before).await;
        let known = h2.exec(&["livemig", "--json", "hosts"]).await.json();
        assert_eq!(known.as_array().map(Vec::len), Some(1), "{known}");
    }
    // It is still the same agent.
    h2.exec(&["livemig", "allow", "h1", "send"]).await;
    let moved = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &moved).await;
    pair.down().await;
}
