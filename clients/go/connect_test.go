package keyturn_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/keyturn/keyturn/clients/go"
)

// An authority signs certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require(t, err)
	certificate, err := x509.ParseCertificate(der)
	require(t, err)
	return &authority{certificate, key}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})
}

// certificate makes one for a host with its key, both in PEM; nil: signed by an authority of its own.
func certificate(t *testing.T, host string, by *authority) (chain []byte, key string) {
	t.Helper()
	if by == nil {
		by = newAuthority(t)
	}
	made, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}, by.certificate, &made.PublicKey, by.key)
	require(t, err)
	encoded, err := x509.MarshalPKCS8PrivateKey(made)
	require(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded}))
}

func TestOptionsThatCannotWorkAreRefusedByName(t *testing.T) {
	chain, key := certificate(t, "localhost", nil)
	for name, each := range map[string]struct {
		options keyturn.Options
		says    string
	}{
		"plain text to another host": {keyturn.Options{Target: "keyturn.example:50051"}, "TLS"},
		"plain text to a number":     {keyturn.Options{Target: "10.0.0.1:50051"}, "TLS"},
		"plain text to IPv6":         {keyturn.Options{Target: "[2001:db8::1]:50051"}, "TLS"},
		"no port":                    {keyturn.Options{Target: "localhost"}, "Target"},
		"a scheme":                   {keyturn.Options{Target: "http://localhost:1"}, "Target"},
		"IPv6 without brackets":      {keyturn.Options{Target: "::1:50051"}, "Target"},
		"no path":                    {keyturn.Options{Target: "unix:"}, "Target"},
		"a host in a socket's path":  {keyturn.Options{Target: "unix://host/k.sock"}, "Target"},
		"TLS on a socket":            {keyturn.Options{Target: "unix:/k.sock", TLS: true}, "TLS"},
		"roots on a socket":          {keyturn.Options{Target: "unix:/k.sock", RootCertificates: chain}, "RootCertificates"},
		"a chain without a key":      {keyturn.Options{Target: "h:1", CertificateChain: chain}, "PrivateKey"},
		"a key without a chain":      {keyturn.Options{Target: "h:1", PrivateKey: keyturn.NewSecret(key)}, "CertificateChain"},
		"no certificates":            {keyturn.Options{Target: "h:1", RootCertificates: []byte("x")}, "RootCertificates"},
		"a chain for a key":          {keyturn.Options{Target: "h:1", CertificateChain: chain, PrivateKey: keyturn.NewSecret(string(chain))}, "PrivateKey"},
		"a token with a space":       {keyturn.Options{Target: "localhost:1", Token: keyturn.NewSecret("to ken")}, "Token"},
		"a token with a line":        {keyturn.Options{Target: "localhost:1", Token: keyturn.NewSecret("to\nken")}, "Token"},
		"a token beyond ASCII":       {keyturn.Options{Target: "localhost:1", Token: keyturn.NewSecret("tökén")}, "Token"},
		"an empty token":             {keyturn.Options{Target: "localhost:1", Token: keyturn.NewSecret("")}, "Token"},
		"a token of spaces":          {keyturn.Options{Target: "localhost:1", Token: keyturn.NewSecret(" ")}, "Token"},
		"a timeout below zero":       {keyturn.Options{Target: "localhost:1", Timeout: -1}, "Timeout"},
		"attempts below zero":        {keyturn.Options{Target: "localhost:1", Retries: keyturn.Retries{Attempts: -1}}, "Retries.Attempts"},
	} {
		client, err := keyturn.NewClient(each.options)
		if err == nil {
			client.Close()
		}
		if !errors.Is(err, keyturn.ErrInvalid) || !strings.Contains(err.Error(), each.says) {
			t.Errorf("%s: got %v, want ErrInvalid that says %s", name, err, each.says)
			continue
		}
		if token := each.options.Token.Reveal(); strings.TrimSpace(token) != "" && strings.Contains(err.Error(), token) {
			t.Errorf("%s: the token is quoted", name)
		}
	}
}

func TestLoopbackTakesPlainText(t *testing.T) {
	for _, target := range []string{"localhost:1", "127.0.0.1:1", "127.255.0.9:1", "[::1]:1", "unix:relative.sock", "unix:///k.sock"} {
		client, err := keyturn.NewClient(keyturn.Options{Target: target})
		if err != nil {
			t.Errorf("%s: %v", target, err)
			continue
		}
		client.Close()
	}
}

func TestTheDefaultTargetIsTheSocketOfThisMachine(t *testing.T) {
	target := func() string {
		client, err := keyturn.NewClient(keyturn.Options{})
		require(t, err)
		defer client.Close()
		return strings.TrimSuffix(strings.TrimPrefix(client.LogValue().String(), "keyturn.Client("), ")")
	}
	t.Setenv("KEYTURN_ADDRESS", "")
	t.Setenv("HOME", "/home/u")
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/1")
	without, with := "unix:/home/u/.keyturn/run/keyturn.sock", "unix:/run/user/1/keyturn/keyturn.sock"
	if os.Geteuid() == 0 {
		without, with = "unix:/run/keyturn/keyturn.sock", "unix:/run/keyturn/keyturn.sock"
	}
	equal(t, "with XDG_RUNTIME_DIR", target(), with)
	t.Setenv("XDG_RUNTIME_DIR", "")
	equal(t, "without it", target(), without)
	t.Setenv("KEYTURN_ADDRESS", "127.0.0.1:7")
	equal(t, "with KEYTURN_ADDRESS", target(), "127.0.0.1:7")
}

func TestASocketIsReachedByAnyPath(t *testing.T) {
	s := &sidecar{}
	directory, err := os.MkdirTemp("", "kt")
	require(t, err)
	defer func() { _ = os.RemoveAll(directory) }()
	path := filepath.Join(directory, "a%20b #?.sock")
	defer listen(t, s, "unix", path)()
	for _, target := range []string{"unix:" + path, "unix://" + path} {
		s.target = target
		_, err := s.open(t, keyturn.Options{}).Decide(t.Context(), request())
		require(t, err)
	}
	for _, heard := range s.heard {
		equal(t, "the authority", heard.Get(":authority")[0], "localhost")
	}
}

func TestEveryCallCarriesTheTokenAndTheUserAgentAndNothingOfTheCaller(t *testing.T) {
	s := serve(t, &sidecar{})
	client := s.open(t, keyturn.Options{Token: keyturn.NewSecret(" " + tokenText + "\n")})
	ctx := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("authorization", "Bearer of-the-caller", "x-own", "1"))
	_, err := client.Decide(ctx, request())
	require(t, err)
	_, err = client.Record(ctx, ticketRecord())
	require(t, err)
	_, err = client.RecordMany(ctx, []keyturn.RecordRequest{ticketRecord()})
	require(t, err)
	require(t, client.RecordLater(ticketRecord()))
	require(t, client.Flush(ctx))
	equal(t, "calls", len(s.heard), 4)
	for _, heard := range s.heard {
		equal(t, "authorization", strings.Join(heard.Get("authorization"), "|"), "Bearer "+tokenText)
		equal(t, "the caller's own", len(heard.Get("x-own")), 0)
		if agent := heard.Get("user-agent")[0]; !strings.HasPrefix(agent, "keyturn-go/"+keyturn.Version+" ") {
			t.Errorf("the user agent is %q", agent)
		}
	}
}

func TestAProxyOfTheEnvironmentIsNotForLoopback(t *testing.T) {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY"} {
		t.Setenv(name, "http://127.0.0.1:1")
	}
	s := &sidecar{}
	defer listen(t, s, "tcp", "127.0.0.1:0")()
	_, err := s.open(t, keyturn.Options{}).Decide(t.Context(), request())
	require(t, err)
}

// serveTLS serves on loopback with a certificate for localhost, and asks clients for one when clients is given.
func serveTLS(t *testing.T, by, clients *authority) *sidecar {
	t.Helper()
	chain, key := certificate(t, "localhost", by)
	pair, err := tls.X509KeyPair(chain, []byte(key))
	require(t, err)
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	if clients != nil {
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
		config.ClientCAs.AddCert(clients.certificate)
	}
	s := &sidecar{}
	t.Cleanup(listen(t, s, "tcp", "127.0.0.1:0", grpc.Creds(credentials.NewTLS(config))))
	_, port, err := net.SplitHostPort(s.target)
	require(t, err)
	s.target = "localhost:" + port
	return s
}

func TestTLSTrustsTheAuthoritiesItIsGiven(t *testing.T) {
	ours := newAuthority(t)
	s := serveTLS(t, ours, nil)
	token := keyturn.NewSecret(tokenText)
	_, err := s.open(t, keyturn.Options{RootCertificates: ours.pem(), Token: token}).Decide(t.Context(), request())
	require(t, err)
	equal(t, "the token", s.heard[0].Get("authorization")[0], "Bearer "+tokenText)

	for name, options := range map[string]keyturn.Options{
		"another authority": {RootCertificates: newAuthority(t).pem()}, "the system's": {TLS: true}, "plain text": {},
	} {
		options.Retries.Attempts = 1
		if _, err := s.open(t, options).Decide(t.Context(), request()); !errors.Is(err, keyturn.ErrUnavailable) {
			t.Errorf("%s: got %v, want ErrUnavailable", name, err)
		}
	}
}

func TestMutualTLSShowsTheClientsCertificate(t *testing.T) {
	ours, clients := newAuthority(t), newAuthority(t)
	s := serveTLS(t, ours, clients)
	chain, key := certificate(t, "gateway", clients)
	_, err := s.open(t, keyturn.Options{
		RootCertificates: ours.pem(), CertificateChain: chain, PrivateKey: keyturn.NewSecret(key),
	}).Decide(t.Context(), request())
	require(t, err)
	_, err = s.open(t, keyturn.Options{RootCertificates: ours.pem(), Retries: keyturn.Retries{Attempts: 1}}).Decide(t.Context(), request())
	equal(t, "without one", errors.Is(err, keyturn.ErrUnavailable), true)
}

func TestALostSidecarIsFoundAgain(t *testing.T) {
	s := &sidecar{}
	stop := listen(t, s, "tcp", "127.0.0.1:0")
	client := s.open(t, keyturn.Options{})
	_, err := client.Decide(t.Context(), request())
	require(t, err)
	stop()
	if _, err := client.Decide(t.Context(), request()); !errors.Is(err, keyturn.ErrUnavailable) {
		t.Fatalf("got %v, want ErrUnavailable", err)
	}
	defer listen(t, s, "tcp", s.target)()
	eventually(t, "a decision", func() bool {
		_, err := client.Decide(t.Context(), request())
		return err == nil
	})
}
