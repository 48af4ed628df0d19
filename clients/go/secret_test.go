package keyturn_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

const (
	tokenText = "kt-token-0123456789abcdefghijklmnopqrstuvwxyz"
)

// prints is a value in every way that Go prints one.
func prints(value any) string {
	var all strings.Builder
	verbs := []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "% X", "%d", "%p", "%t", "%e", "%c", "%U", "%T", "%10.90s"}
	for _, printed := range []any{
		value, &value, []any{value}, map[string]any{"key": value}, struct{ Field any }{value}, struct{ field any }{value},
	} {
		for _, verb := range verbs {
			fmt.Fprintf(&all, verb+"\n", printed)
		}
		for _, marshal := range []func(any) ([]byte, error){json.Marshal, xml.Marshal, func(value any) ([]byte, error) {
			var encoded bytes.Buffer
			err := gob.NewEncoder(&encoded).Encode(value)
			return encoded.Bytes(), err
		}} {
			marshaled, err := marshal(printed)
			fmt.Fprintln(&all, string(marshaled), err)
		}
		slog.New(slog.NewTextHandler(&all, nil)).Info("shown", "value", printed)
		slog.New(slog.NewJSONHandler(&all, nil)).Info("shown", "value", printed)
	}
	dig(&all, reflect.ValueOf(value), map[uintptr]bool{})
	return all.String()
}

// dig prints what a printer finds that goes down every pointer and into unexported fields.
func dig(all *strings.Builder, value reflect.Value, seen map[uintptr]bool) {
	switch value.Kind() {
	case reflect.String:
		fmt.Fprintln(all, value.String())
	case reflect.Pointer:
		// Not into a client: grpc's connection has what it sends and receives in its buffers.
		if value.IsNil() || seen[value.Pointer()] || value.Type() == reflect.TypeFor[*keyturn.Client]() {
			return
		}
		seen[value.Pointer()] = true
		dig(all, value.Elem(), seen)
	case reflect.Interface:
		if !value.IsNil() {
			dig(all, value.Elem(), seen)
		}
	case reflect.Struct:
		for i := range value.NumField() {
			dig(all, value.Field(i), seen)
		}
	case reflect.Slice, reflect.Array:
		if value.Type().Elem().Kind() == reflect.Uint8 && value.Kind() == reflect.Slice {
			fmt.Fprintln(all, string(value.Bytes()))
			return
		}
		for i := range value.Len() {
			dig(all, value.Index(i), seen)
		}
	case reflect.Map:
		for entries := value.MapRange(); entries.Next(); {
			dig(all, entries.Key(), seen)
			dig(all, entries.Value(), seen)
		}
	}
}

func forbid(t *testing.T, what, printed string, secrets ...string) {
	t.Helper()
	if len(printed) < 100 {
		t.Fatalf("%s: nothing was printed", what)
	}
	for _, secret := range secrets {
		for _, form := range []string{
			secret, hex.EncodeToString([]byte(secret)), strings.ToUpper(hex.EncodeToString([]byte(secret))),
			fmt.Sprintf("% X", secret), strings.Trim(fmt.Sprint([]byte(secret)), "[]"), secret[9:],
		} {
			if at := strings.Index(printed, form); at >= 0 {
				t.Errorf("%s prints %q: …%s", what, secret, printed[max(0, at-120):at])
			}
		}
	}
}

func TestNothingPrintsASecretAHandleATicketOrAToken(t *testing.T) {
	_, key := certificate(t, "localhost", nil)
	s := serve(t, &sidecar{onDecide: func(_ context.Context, r *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		switch r.GetUserId() {
		case "key":
			return keyAnswer(), nil
		case "denied":
			return denialAnswer(), nil
		case "fault":
			return nil, fault(codes.NotFound, "USER_NOT_FOUND")
		}
		return ticketAnswer(), nil
	}})
	ctx, token := context.Background(), keyturn.NewSecret(tokenText)
	client := s.open(t, keyturn.Options{Token: token})
	decided := func(user string) *keyturn.Decision {
		decision, err := client.Decide(ctx, keyturn.DecideRequest{UserID: user, Provider: "openai"})
		require(t, err)
		return decision
	}
	called := func(user string) *keyturn.Call {
		call, err := client.Request(ctx, keyturn.DecideRequest{UserID: user, Provider: "openai"})
		require(t, err)
		t.Cleanup(call.Close)
		return call
	}
	_, notFound := client.Decide(ctx, keyturn.DecideRequest{UserID: "fault", Provider: "openai"})
	_, denied := client.Request(ctx, keyturn.DecideRequest{UserID: "denied", Provider: "openai"})
	_, badToken := keyturn.NewClient(keyturn.Options{Token: keyturn.NewSecret(tokenText + "\n" + tokenText)})
	_, badKey := keyturn.NewClient(keyturn.Options{CertificateChain: []byte("x"), PrivateKey: keyturn.NewSecret(key)})
	refused := called("key")
	require(t, refused.Failed(keyturn.Failure{Outcome: keyturn.OutcomeAuthRejected}))
	unsent := keyturn.Unsent{Record: keyturn.RecordRequest{Settles: decided("key")}, Err: notFound}
	for what, value := range map[string]any{
		"a secret":           token,
		"a pointer to it":    &token,
		"a handle":           decided("key").Key.Handle,
		"a ticket":           decided("ticket").Ticket.Ticket,
		"a decision":         decided("key"),
		"a decision's value": *decided("key"),
		"a ticket decision":  *decided("ticket"),
		"a key handle":       *decided("key").Key,
		"a credit ticket":    *decided("ticket").Ticket,
		"a call":             called("key"),
		"a ticket's call":    called("ticket"),
		"a refused call":     refused,
		"options":            keyturn.Options{Token: token, PrivateKey: keyturn.NewSecret(key)},
		"a request":          keyturn.DecideRequest{FailedKeys: []keyturn.SealedHandle{keyturn.NewSealedHandle(handleText)}},
		"a record":           ticketRecord(),
		"an unsent record":   unsent,
		"an error":           notFound,
		"a denial":           denied,
		"a refused token":    badToken,
		"a refused key":      badKey,
	} {
		forbid(t, what, prints(value), secretText, handleText, ticketText, tokenText, key[40:100])
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		equal(t, verb, fmt.Sprintf(verb, client), "keyturn.Client("+s.target+")")
	}
	logged, err := json.Marshal(map[string]any{"client": client})
	require(t, err)
	equal(t, "JSON", string(logged), `{"client":{}}`)
}

func TestASecretShowsItselfAsStars(t *testing.T) {
	secret := keyturn.NewSecret(secretText)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		equal(t, verb, fmt.Sprintf(verb, secret), "Secret(***)")
	}
	marshaled, err := json.Marshal(map[string]any{"key": secret})
	require(t, err)
	equal(t, "JSON", string(marshaled), `{"key":"Secret(***)"}`)
	equal(t, "what it reveals", secret.Reveal(), secretText)
	equal(t, "the zero secret", keyturn.Secret{}.Reveal(), "")
}

func TestSecretsAreEqualByTheirContents(t *testing.T) {
	secret := keyturn.NewSecret(secretText)
	equal(t, "the same", secret.Equal(keyturn.NewSecret(secretText)), true)
	equal(t, "another", secret.Equal(keyturn.NewSecret(secretText[1:])), false)
	equal(t, "zeros", keyturn.Secret{}.Equal(keyturn.NewSecret("")), true)
	if reflect.TypeFor[keyturn.Secret]().Comparable() {
		t.Error("== compares secrets, and a map takes them as keys")
	}
}

func TestHandlesAndTicketsShowTheirFirstCharacters(t *testing.T) {
	equal(t, "a handle", fmt.Sprintf("%v", keyturn.NewSealedHandle(handleText)), "SealedHandle(kth1_han…)")
	equal(t, "a ticket", fmt.Sprintf("%#v", keyturn.NewSealedTicket(ticketText)), "SealedTicket(ktt1_tic…)")
	equal(t, "a short one", keyturn.NewSealedTicket("short").String(), "SealedTicket(…)")
	equal(t, "its text", keyturn.NewSealedHandle(handleText).Text(), handleText)
}

func TestTheDefaultLogOfAnUnsentRecordHasTheOutcomeAndTheErrorAlone(t *testing.T) {
	var logged bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&logged, nil)))
	defer slog.SetDefault(before)
	s := serve(t, &sidecar{onBatchRecord: func(context.Context, *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
		return nil, fault(codes.PermissionDenied, "PERMISSION_DENIED")
	}})
	client := s.open(t, keyturn.Options{CloseTimeout: 20 * time.Second})
	record := ticketRecord()
	record.ErrorMessage = "the provider said " + secretText
	require(t, client.RecordLater(record))
	client.Close()
	forbid(t, "the log", logged.String(), secretText, ticketText)
	for _, part := range []string{"outcome=SUCCESS", "PERMISSION_DENIED"} {
		if !strings.Contains(logged.String(), part) {
			t.Errorf("%q is not in %q", part, logged.String())
		}
	}
}
