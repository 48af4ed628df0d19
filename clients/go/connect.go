package keyturn

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

var (
	hostAndPort = regexp.MustCompile(`^(\[[^\[\]/]+\]|[^\[\]:/]+):\d{1,5}$`)
	bearerToken = regexp.MustCompile(`^[!-~]+$`)
)

// connect makes the connection; it opens with the first call. It returns the target too, to be shown.
func connect(options Options) (*grpc.ClientConn, string, error) {
	target, err := address(options.Target)
	if err != nil {
		return nil, "", err
	}
	secured, err := transport(options)
	if err != nil {
		return nil, "", err
	}
	dialing := []grpc.DialOption{
		grpc.WithUserAgent("keyturn-go/" + Version),
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		// A restarted sidecar is found again within a second (jitter included), not after grpc's 1 to 120.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 800 * time.Millisecond,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
	}
	where := target
	if path, ok := strings.CutPrefix(target, "unix:"); ok {
		path, err := socket(target, path)
		if err != nil {
			return nil, "", err
		}
		if secured != nil {
			return nil, "", invalid("Target %s: a Unix socket takes no TLS, RootCertificates nor CertificateChain", target)
		}
		// Dialed here: grpc's own resolver would read the path as a URI, and send it as the authority.
		where = "localhost"
		dialing = append(dialing, grpc.WithNoProxy(),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", path)
			}))
	} else if host := hostAndPort.FindStringSubmatch(target); host == nil {
		return nil, "", invalid("Target %q: write unix:PATH or HOST:PORT ([HOST]:PORT for IPv6)", target)
	} else if loopback(strings.Trim(host[1], "[]")) {
		// A proxy of the environment is not for this machine's own sidecar.
		dialing = append(dialing, grpc.WithNoProxy())
	} else if secured == nil {
		return nil, "", invalid("Target %s is not this machine: give TLS or RootCertificates, so that keys and tokens do"+
			" not cross the network in plain text", target)
	} else {
		// A peer that vanished without a word is noticed by pings, not by TCP after minutes.
		dialing = append(dialing, grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 30 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true,
		}))
	}
	if secured == nil {
		secured = insecure.NewCredentials()
	}
	// passthrough: a name is looked up for every connection, so that a sidecar that moved is found at once.
	connection, err := grpc.NewClient("passthrough:///"+where, append(dialing, grpc.WithTransportCredentials(secured))...)
	if err != nil {
		return nil, "", invalid("Target %s: %v", target, err)
	}
	return connection, target, nil
}

// address is where the sidecar listens: as given, by KEYTURN_ADDRESS, or where it does by default.
func address(target string) (string, error) {
	target = given(target, os.Getenv("KEYTURN_ADDRESS"))
	if target != "" {
		return target, nil
	}
	directory, runtime := "/run/keyturn", os.Getenv("XDG_RUNTIME_DIR")
	switch {
	case os.Geteuid() == 0:
	case runtime != "":
		directory = filepath.Join(runtime, "keyturn")
	default:
		home, err := os.UserHomeDir()
		if err != nil {
			return "", invalid("no Target, no KEYTURN_ADDRESS, and no HOME to find the default socket in")
		}
		directory = filepath.Join(home, ".keyturn", "run")
	}
	return "unix:" + filepath.Join(directory, "keyturn.sock"), nil
}

// socket is the path of unix:PATH or unix:///PATH.
func socket(target, path string) (string, error) {
	if rest, ok := strings.CutPrefix(path, "//"); ok {
		if !strings.HasPrefix(rest, "/") {
			return "", invalid("Target %q: write unix:PATH, or unix:///PATH for an absolute one", target)
		}
		path = rest
	}
	if path == "" {
		return "", invalid("Target %q: the path of the socket is missing", target)
	}
	return path, nil
}

// loopback reports whether the host is this machine by its name or number. No name is looked up.
func loopback(host string) bool {
	number, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && number.Unmap().IsLoopback()
}

// transport is TLS as the options want it; nil: plain text.
func transport(options Options) (credentials.TransportCredentials, error) {
	key := options.PrivateKey.Reveal()
	if (len(options.CertificateChain) == 0) != (key == "") {
		return nil, invalid("a client certificate takes both CertificateChain and PrivateKey")
	}
	if !options.TLS && len(options.RootCertificates) == 0 && key == "" {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(options.RootCertificates) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(options.RootCertificates) {
			return nil, invalid("RootCertificates holds no certificate in PEM")
		}
	}
	if key != "" {
		certificate, err := tls.X509KeyPair(options.CertificateChain, []byte(key))
		if err != nil {
			return nil, invalid("CertificateChain and PrivateKey are no PEM certificate with its key")
		}
		// By a func, so that the key is in no field that a printer could dig up.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &certificate, nil
		}
	}
	return credentials.NewTLS(config), nil
}

// bearer is what a call carries for the token; empty without one. A token that is given and empty is a mistake: what should
// have been in the environment is not there.
func bearer(token Secret) (Secret, error) {
	if token.text == nil {
		return Secret{}, nil
	}
	text := strings.TrimSpace(token.Reveal())
	if !bearerToken.MatchString(text) {
		return Secret{}, invalid("Token is printable ASCII without spaces, and not empty")
	}
	return NewSecret("Bearer " + text), nil
}
